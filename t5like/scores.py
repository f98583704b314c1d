"""How good predicted texts are against references: the field's measures, each by the implementation that defines it.

Called by `evaluate`, on strings; nothing here knows models. All scores are in percent, 0 to 100, higher is better, over
the whole set and not a mean of batches.

    | name        | per example, then                                           | source                              |
    |-------------|-------------------------------------------------------------|-------------------------------------|
    | exact_match | equal after SQuAD's normalisation; best reference; mean     | Rajpurkar et al. 2016, section 6.1  |
    | f1          | overlap of words after it; best reference; mean             | the same                            |
    | accuracy    | equal but for white space at the ends; any reference; mean  |                                     |
    | bleu        | corpus BLEU, case:mixed, eff:no, tok:13a, smooth:exp        | Post 2018, package sacrebleu        |
    | chrf        | corpus chrF2, 6 characters, no words (nc:6, nw:0, space:no) | Popovic 2015, package sacrebleu     |
    | rouge1      | F-measure of words, Porter stemmer; best reference; mean    | Lin 2004, package rouge-score       |
    | rouge2      | the same of pairs of words                                  | the same                            |
    | rougeL      | the same of the longest common subsequence of the whole     | the same; not rougeLsum, which cuts |
    |             | text                                                        | texts into lines                    |

Scores mean little alone: `majority_baseline`, `copy_baseline` and `lead_baseline` are predictions without a model.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from t5like.errors import ConfigError

References = Sequence[Sequence[str]]  # of each example, all that are right; at least one


def score(names: Sequence[str], predictions: Sequence[str], references: References) -> dict[str, float]:
    """Each named measure of the predictions, in percent.

    Args:
        names: of `METRICS`.
        predictions: one text per example.
        references: of each example, one or several right texts.

    Raises:
        ConfigError: a name is unknown, or its package is not installed.
        ValueError: there is nothing to score, or the two don't go together.
    """
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"evaluate.metrics={name!r} must be one of {', '.join(METRICS)}; use exact_match")
    if not predictions or len(predictions) != len(references) or not all(references):
        raise ValueError(f"{len(predictions)} predictions need as many non-empty lists of references, at least one")
    if isinstance(references[0], str):
        raise ValueError("references must be a list of lists of texts, not of texts")
    return {name: float(METRICS[name](predictions, references)) for name in names}


# ---- What needs no model ----


def majority_baseline(train_targets: Sequence[str]) -> str:
    """The most frequent target, the first of equals by the alphabet: what to answer to everything."""
    counts = Counter(train_targets)
    return min(counts, key=lambda target: (-counts[target], target))


def copy_baseline(inputs: Sequence[str]) -> list[str]:
    """The inputs as predictions: for translation and corrections, where much stays as it is."""
    return list(inputs)


def lead_baseline(inputs: Sequence[str], num_words: int) -> list[str]:
    """The first words of each input as predictions: for summarization, where they are hard to beat on news."""
    return [" ".join(text.split()[:num_words]) for text in inputs]


# ---- Words ----


def normalize(text: str) -> str:
    """SQuAD's normalisation: lower case, no ASCII punctuation, no articles, single spaces, in this order.

    "The U.S.A.'s  end" becomes "usas end".
    """
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _exact_match(prediction: str, reference: str) -> float:
    return float(normalize(prediction) == normalize(reference))


def _f1(prediction: str, reference: str) -> float:
    """2 x common words / all words. Where one of them has no words, they must both have none (SQuAD 2.0)."""
    predicted, right = Counter(normalize(prediction).split()), Counter(normalize(reference).split())
    if not predicted or not right:
        return float(predicted == right)
    return 2 * (predicted & right).total() / (predicted.total() + right.total())


def _accuracy(prediction: str, reference: str) -> float:
    return float(prediction.strip() == reference.strip())


def _best(measure: Callable[[str, str], float], predictions: Sequence[str], references: References) -> float:
    """The mean over examples of the best over references, in percent."""
    best = (max(measure(text, each) for each in right) for text, right in zip(predictions, references, strict=True))
    return 100 * sum(best) / len(predictions)


# ---- Packages ----


def _sacrebleu(kind: str, predictions: Sequence[str], references: References) -> float:
    try:
        from sacrebleu import metrics
    except ImportError:
        raise _missing(kind.lower(), "sacrebleu") from None
    # It wants the first reference of every example, then the second; None where an example has fewer.
    most = max(map(len, references))
    streams = [[right[place] if place < len(right) else None for right in references] for place in range(most)]
    return getattr(metrics, kind)().corpus_score(list(predictions), streams).score


def _rouge(name: str, predictions: Sequence[str], references: References) -> float:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise _missing(name, "rouge-score") from None
    scorer = RougeScorer([name], use_stemmer=True)
    return _best(lambda text, each: scorer.score(each, text)[name].fmeasure, predictions, references)


def _missing(name: str, package: str) -> ConfigError:
    return ConfigError(f"evaluate.metrics={name!r} needs the package {package}; pip install 't5like[eval]'")


METRICS: dict[str, Callable[[Sequence[str], References], float]] = {
    "exact_match": lambda predictions, references: _best(_exact_match, predictions, references),
    "f1": lambda predictions, references: _best(_f1, predictions, references),
    "accuracy": lambda predictions, references: _best(_accuracy, predictions, references),
    "bleu": lambda predictions, references: _sacrebleu("BLEU", predictions, references),
    "chrf": lambda predictions, references: _sacrebleu("CHRF", predictions, references),
    "rouge1": lambda predictions, references: _rouge("rouge1", predictions, references),
    "rouge2": lambda predictions, references: _rouge("rouge2", predictions, references),
    "rougeL": lambda predictions, references: _rouge("rougeL", predictions, references),
}
