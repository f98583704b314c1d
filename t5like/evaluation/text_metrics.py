"""Metrics of predicted texts against references, each computed as by the implementation that defines it.

Called by `task_eval` with strings; nothing here depends on models. All scores are in percent, 0 to 100, higher is
better, over the whole set and not a mean over batches. A prediction equal to its reference scores 100 in any script.

    | name        | per example, then                                           | source                              |
    |-------------|-------------------------------------------------------------|-------------------------------------|
    | exact_match | equal after normalization; best reference; mean             | Rajpurkar et al. 2016, section 6.1  |
    | f1          | overlap of the words after it; best reference; mean         | the same                            |
    | accuracy    | equal except white space at the ends; any reference; mean   |                                     |
    | bleu        | corpus BLEU, case:mixed, eff:no, smooth:exp                 | Post 2018, package sacrebleu        |
    | chrf        | corpus chrF2, 6 characters, no words (nc:6, nw:0, space:no) | Popovic 2015, package sacrebleu     |
    | rouge1      | F-measure of words; best reference; mean                    | Lin 2004, package rouge-score       |
    | rouge2      | the same for pairs of words                                 | the same                            |
    | rougeL      | the same for the longest common subsequence of the whole    | the same; not rougeLsum, which      |
    |             | text                                                        | splits texts into lines             |

The definition of a word depends on the language (`rules_for`); `Rules.describe` states it in a line for each score:

    | language          | exact_match, f1                   | rouge                                | bleu              |
    |-------------------|-----------------------------------|--------------------------------------|-------------------|
    | English           | SQuAD's, without articles         | a-z, 0-9; Porter stemmer, as rouge's | 13a               |
    | any other         | MLQA's, articles kept             | Unicode words, no stemmer            | 13a               |
    | without spaces    | the same; a letter is a word      | the same; a letter is a word         | zh, ja-mecab,     |
    |                   |                                   |                                      | ko-mecab or char  |

Scores need a comparison: `majority_baseline`, `copy_baseline` and `lead_baseline` predict without a model.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from t5like.errors import ConfigError
from t5like.evaluation import segmentation

References = Sequence[Sequence[str]]  # per example, all correct texts; at least one

UNSPACED = ("th", "lo", "km", "my", "bo", "dz")
# sacrebleu's tokenizer by language, where it is not 13a: its default, and single letters where there are no spaces.
TOKENIZERS = {"zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab", **dict.fromkeys(UNSPACED, "char")}


class Rules(NamedTuple):
    """How texts of a language are normalized and segmented.

    Attributes:
        english: whether the rules of SQuAD and of rouge_score's own tokenizer apply, which are for English only.
        tokenizer: the name of sacrebleu's tokenizer for BLEU.
    """

    english: bool
    tokenizer: str

    def describe(self, name: str) -> str:
        """A readable line about how a metric of `METRICS` normalizes and segments texts."""
        words = "words by Unicode, letters where a script has no spaces"
        if name in ("exact_match", "f1"):
            normal = "lower case, no ASCII punctuation, no a, an, the (SQuAD)" if self.english else "case folded, NFC, "
            normal += "" if self.english else "no punctuation (MLQA without articles)"
            return normal if name == "exact_match" or self.english else f"{normal}; {words}"
        if name == "accuracy":
            return "NFC, without white space at the ends"
        if name == "bleu":
            return f"sacrebleu, case:mixed|eff:no|tok:{self.tokenizer}|smooth:exp"
        if name == "chrf":
            return "sacrebleu, case:mixed|eff:yes|nc:6|nw:0|space:no"
        return "rouge_score, words of a-z and 0-9, Porter stemmer" if self.english else f"rouge_score, {words}"


def rules_for(references: References, language: str = "auto") -> Rules:
    """The rules of a language, given as an ISO 639-1 code, or detected from the letters of the references ("auto").

    Texts in which at most 1 letter in 200 is not ASCII (names, quotations) count as English. Other languages with only
    ASCII letters, such as Indonesian or Swahili, need their code. For scripts without spaces, BLEU is computed on
    single letters (for Han, by sacrebleu's zh). That includes detected Japanese, so that the score does not depend on
    whether MeCab is installed. The codes ja and ko need MeCab.
    """
    if language != "auto":
        return Rules(language == "en", TOKENIZERS.get(language, "13a"))
    letters = segmentation.letters([text for right in references for text in right])
    if 10 * letters.unspaced > letters.all:
        return Rules(False, "char")
    return Rules(200 * letters.beyond_ascii <= letters.all, "zh" if 10 * letters.han > letters.all else "13a")


def score(
    names: Sequence[str], predictions: Sequence[str], references: References, language: str = "auto"
) -> dict[str, float]:
    """Each named metric of the predictions, in percent.

    Args:
        names: keys of `METRICS`.
        predictions: one text per example.
        references: per example, one or several correct texts.
        language: of the texts, see `rules_for`.

    Raises:
        ConfigError: a name is unknown, or its package is not installed.
        ValueError: there are no predictions, or their number is not that of the references.
    """
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"evaluate.metrics={name!r} must be one of {', '.join(METRICS)}; use exact_match")
    if not predictions or len(predictions) != len(references) or not all(references):
        raise ValueError(f"{len(predictions)} predictions need as many non-empty lists of references, at least one")
    if isinstance(references[0], str):
        raise ValueError("references must be a list of lists of texts, not of texts")
    rules = rules_for(references, language)
    return {name: float(METRICS[name](predictions, references, rules)) for name in names}


def score_answer(name: str, answer: str, references: Sequence[str], language: str = "auto") -> float:
    """One metric of one answer, from 0 to 1, for use as a reward.

    BLEU counts n-grams up to the length of the answer (sacrebleu's sentence BLEU, ``eff:yes``). Otherwise every answer
    of fewer than 4 words would score 0, also the right one.

    Raises:
        ConfigError: as `score`.
        ValueError: there are no references.
    """
    if name == "bleu" and references:
        rules = rules_for([references], language)
        return _sacrebleu("BLEU", [answer], [references], tokenize=rules.tokenizer, effective_order=True) / 100
    return score([name], [answer], [references], language)[name] / 100


# ---- Baselines without a model ----


def majority_baseline(train_targets: Sequence[str]) -> str:
    """The most frequent target, as the prediction for every example; of equally frequent ones the first in order."""
    counts = Counter(train_targets)
    return min(counts, key=lambda target: (-counts[target], target))


def copy_baseline(inputs: Sequence[str]) -> list[str]:
    """The inputs as predictions: for translation and text correction, where much of the input is unchanged."""
    return list(inputs)


def lead_baseline(inputs: Sequence[str], num_words: int) -> list[str]:
    """The first words of each input as predictions: for summarization, where this is a strong baseline on news.

    In scripts without spaces a letter is a word.
    """
    return [segmentation.first_words(text, num_words) for text in inputs]


# ---- Words ----


def normalize(text: str, *, english: bool) -> str:
    """A text normalized for exact_match and f1."""
    return segmentation.without_articles(text) if english else segmentation.without_punctuation(text)


def _exact_match(prediction: str, reference: str, rules: Rules) -> float:
    return float(normalize(prediction, english=rules.english) == normalize(reference, english=rules.english))


def _f1(prediction: str, reference: str, rules: Rules) -> float:
    """2 x common words / all words. If one text has no words, the score is 1 if both are equal, else 0 (SQuAD 2.0)."""
    both = [normalize(text, english=rules.english) for text in (prediction, reference)]
    predicted, right = (Counter(text.split() if rules.english else segmentation.words(text)) for text in both)
    if not predicted or not right:  # empty, or only punctuation
        return float(both[0] == both[1])
    return 2 * (predicted & right).total() / (predicted.total() + right.total())


def _accuracy(prediction: str, reference: str, _: Rules) -> float:
    prediction, reference = (unicodedata.normalize("NFC", text).strip() for text in (prediction, reference))
    return float(prediction == reference)


def _of_pairs(metric: Callable[[str, str, Rules], float]) -> "CorpusMetric":
    """A metric of a set, from a metric of one prediction and one reference."""
    return lambda predictions, references, rules: _best(
        lambda text, each: metric(text, each, rules), predictions, references
    )


def _best(metric: Callable[[str, str], float], predictions: Sequence[str], references: References) -> float:
    """The mean over examples of the best value over references, in percent."""
    best = (max(metric(text, each) for each in right) for text, right in zip(predictions, references, strict=True))
    return 100 * sum(best) / len(predictions)


# ---- Packages ----


def _sacrebleu(kind: str, predictions: Sequence[str], references: References, **options: str | bool) -> float:
    try:
        from sacrebleu import metrics
    except ImportError:
        raise _missing(kind.lower(), "sacrebleu") from None
    try:
        metric = getattr(metrics, kind)(**options)
    except RuntimeError:  # its tokenizers for Japanese and Korean need MeCab
        name = options["tokenize"]
        raise ConfigError(
            f"evaluate.metrics='bleu' needs MeCab for {name}; pip install 'sacrebleu[{name[:2]}]', or use "
            "evaluate.language=auto"
        ) from None
    # sacrebleu expects the first reference of every example, then the second, ...; None where an example has fewer.
    most = max(map(len, references))
    streams = [[right[index] if index < len(right) else None for right in references] for index in range(most)]
    return metric.corpus_score(list(predictions), streams).score


class _Words:
    """The tokenizer interface of rouge_score."""

    tokenize = staticmethod(segmentation.words)


def _rouge(name: str, predictions: Sequence[str], references: References, rules: Rules) -> float:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise _missing(name, "rouge-score") from None
    scorer = RougeScorer([name], use_stemmer=True) if rules.english else RougeScorer([name], tokenizer=_Words())
    return _best(lambda text, each: scorer.score(each, text)[name].fmeasure, predictions, references)


def _missing(name: str, package: str) -> ConfigError:
    return ConfigError(f"evaluate.metrics={name!r} needs the package {package}; pip install 't5like[eval]'")


CorpusMetric = Callable[[Sequence[str], References, Rules], float]
METRICS: dict[str, CorpusMetric] = {
    "exact_match": _of_pairs(_exact_match),
    "f1": _of_pairs(_f1),
    "accuracy": _of_pairs(_accuracy),
    "bleu": lambda predictions, references, rules: _sacrebleu(
        "BLEU", predictions, references, tokenize=rules.tokenizer
    ),
    "chrf": lambda predictions, references, _: _sacrebleu("CHRF", predictions, references),
    "rouge1": partial(_rouge, "rouge1"),
    "rouge2": partial(_rouge, "rouge2"),
    "rougeL": partial(_rouge, "rougeL"),
}
