"""Metrics of predicted labels and numbers, in percent, higher is better; computed in float64 on the host.

    | name      | over N texts, or the words of N texts                       | source                                 |
    |-----------|-------------------------------------------------------------|----------------------------------------|
    | accuracy  | share of right labels                                       |                                        |
    | macro_f1  | mean over labels of 2 TP / (2 TP + FP + FN); a label that   | scikit-learn's f1_score, macro         |
    |           | is neither predicted nor right anywhere does not count      |                                        |
    | matthews  | correlation of predicted and right labels, any number of    | Gorodkin 2004; the metric of CoLA      |
    |           | labels; 0 if all predictions, or all labels, are one        | (Warstadt et al. 2019)                 |
    | pearson   | correlation of numbers; 0 if either side is constant        | the metrics of STS-B (Cer et al. 2017) |
    | spearman  | the same of their ranks; equal numbers have their mean rank |                                        |
    | entity_f1 | F1 of entities, all types together: right if first word,    | CoNLL 2003 (Tjong Kim Sang & De        |
    |           | last word and type are right                                | Meulder), its script conlleval         |

Called by `label_eval`.
"""

from collections.abc import Callable, Sequence

import numpy as np


def score(
    names: Sequence[str], predicted: Sequence[np.ndarray], right: Sequence[np.ndarray], labels: Sequence[str]
) -> dict[str, float]:
    """The named metrics, in percent.

    Args:
        names: keys of `METRICS`, or entity_f1.
        predicted, right: of each text its labels' indices, one or one per word, or its number.
        labels: names of the labels, which entity_f1 reads.

    Raises:
        ValueError: there is no text, or there are not as many predictions.
    """
    if not predicted or [len(each) for each in predicted] != [len(each) for each in right]:
        raise ValueError(f"{len(predicted)} predictions need as many labels, at least one")
    flat = np.concatenate(predicted), np.concatenate(right)
    names_of = lambda texts: [[labels[index] for index in each] for each in texts]
    value = lambda name: (
        entity_f1(names_of(predicted), names_of(right)) if name == "entity_f1" else METRICS[name](*flat)
    )
    return {name: 100 * value(name) for name in names}


def accuracy(predicted_N: np.ndarray, right_N: np.ndarray) -> float:
    """The share of right labels."""
    return float((predicted_N == right_N).mean())


def macro_f1(predicted_N: np.ndarray, right_N: np.ndarray) -> float:
    """The mean F1 of the labels that occur."""
    counts_CC = _confusion(predicted_N, right_N)
    sizes_C = counts_CC.sum(0) + counts_CC.sum(1)
    return float((2 * np.diag(counts_CC) / np.maximum(sizes_C, 1))[sizes_C > 0].mean())


def matthews(predicted_N: np.ndarray, right_N: np.ndarray) -> float:
    """The correlation of two labellings (Gorodkin 2004, equation 8), from -1 to 1."""
    counts_CC = _confusion(predicted_N, right_N).astype(np.float64)
    total, right_C, predicted_C = counts_CC.sum(), counts_CC.sum(1), counts_CC.sum(0)
    covariance = np.trace(counts_CC) * total - right_C @ predicted_C
    spread = (total**2 - right_C @ right_C) * (total**2 - predicted_C @ predicted_C)
    return float(covariance / np.sqrt(spread)) if spread > 0 else 0.0


def pearson(predicted_N: np.ndarray, right_N: np.ndarray) -> float:
    """The linear correlation of two lists of numbers, from -1 to 1."""
    left_N, right_N = (
        np.asarray(each, np.float64) - np.mean(each, dtype=np.float64) for each in (predicted_N, right_N)
    )
    spread = np.sqrt((left_N @ left_N) * (right_N @ right_N))
    return float(left_N @ right_N / spread) if spread > 0 else 0.0


def spearman(predicted_N: np.ndarray, right_N: np.ndarray) -> float:
    """The correlation of the ranks, from -1 to 1."""
    return pearson(_ranks(predicted_N), _ranks(right_N))


def entity_f1(predicted: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> float:
    """F1 of the entities of all texts together, from 0 to 1; 1 if there are none on either side.

    Args:
        predicted, right: of each text the labels of its words: O, B-TYPE or I-TYPE.
    """
    found, known = (
        {(number, *entity) for number, labels in enumerate(texts) for entity in entities(labels)}
        for texts in (predicted, right)
    )
    return 2 * len(found & known) / (len(found) + len(known)) if found or known else 1.0


def entities(labels: Sequence[str]) -> list[tuple[int, int, str]]:
    """First word, end and type of each entity, as conlleval reads labels.

        O B-PER I-PER I-LOC B-LOC    (1, 3, PER) (3, 4, LOC) (4, 5, LOC)

    An entity begins at B-TYPE, and at an I-TYPE that continues no entity of that type.
    """
    found: list[tuple[int, int, str]] = []
    for index, label in enumerate(labels):
        kind = label[2:]
        if label != "O" and label[0] == "I" and found and found[-1][1:] == (index, kind):
            found[-1] = (found[-1][0], index + 1, kind)
        elif label != "O":
            found.append((index, index + 1, kind))
    return found


def _confusion(predicted_N: np.ndarray, right_N: np.ndarray) -> np.ndarray:
    """int64 [C, C]: how often each label (row) was predicted as each label (column)."""
    size = int(max(predicted_N.max(), right_N.max())) + 1
    pairs_N = right_N.astype(np.int64) * size + predicted_N
    return np.bincount(pairs_N, minlength=size * size).reshape(size, size)


def _ranks(x_N: np.ndarray) -> np.ndarray:
    """float64 [N]: ranks from 1; equal numbers have the mean of their ranks."""
    _, place_N, count_U = np.unique(x_N, return_inverse=True, return_counts=True)
    last_U = np.cumsum(count_U)
    return (last_U - (count_U - 1) / 2)[place_N]


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
