"""How good predicted texts are against references: the field's measures, each by the implementation that defines it.

Called by `answers`, on strings; nothing here knows models. All scores are in percent, 0 to 100, higher is better, over
the whole set and not a mean of batches. The same text scores 100, whatever its script.

    | name        | per example, then                                           | source                              |
    |-------------|-------------------------------------------------------------|-------------------------------------|
    | exact_match | equal after normalisation; best reference; mean             | Rajpurkar et al. 2016, section 6.1  |
    | f1          | overlap of words after it; best reference; mean             | the same                            |
    | accuracy    | equal but for white space at the ends; any reference; mean  |                                     |
    | bleu        | corpus BLEU, case:mixed, eff:no, smooth:exp                 | Post 2018, package sacrebleu        |
    | chrf        | corpus chrF2, 6 characters, no words (nc:6, nw:0, space:no) | Popovic 2015, package sacrebleu     |
    | rouge1      | F-measure of words; best reference; mean                    | Lin 2004, package rouge-score       |
    | rouge2      | the same of pairs of words                                  | the same                            |
    | rougeL      | the same of the longest common subsequence of the whole     | the same; not rougeLsum, which cuts |
    |             | text                                                        | texts into lines                    |

What a word is depends on the language (`rules_for`), and `Rules.describe` says it in a line beside each score:

    | language          | exact_match, f1                   | rouge                                | bleu              |
    |-------------------|-----------------------------------|--------------------------------------|-------------------|
    | English           | SQuAD's, without articles         | a-z, 0-9; Porter stemmer, as rouge's | 13a               |
    | any other         | MLQA's, no articles taken away    | Unicode words, no stemmer            | 13a               |
    | without spaces    | the same; a letter is a word      | the same; a letter is a word         | zh, ja-mecab,     |
    |                   |                                   |                                      | ko-mecab or char  |

Scores mean little alone: `majority_baseline`, `copy_baseline` and `lead_baseline` are predictions without a model.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from t5like.errors import ConfigError
from t5like.evaluation import segmentation

References = Sequence[Sequence[str]]  # of each example, all that are right; at least one


UNSPACED = ("th", "lo", "km", "my", "bo", "dz")
# sacrebleu's tokenizers by language, where it is not 13a: its own choice, and letters where there are no spaces.
TOKENIZERS = {"zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab", **dict.fromkeys(UNSPACED, "char")}


class Rules(NamedTuple):
    """How texts of a language are measured.

    Attributes:
        english: whether the rules of SQuAD and of rouge_score's own tokenizer are used, which know English alone.
        tokenizer: sacrebleu's, by its name, for BLEU.
    """

    english: bool
    tokenizer: str

    def describe(self, name: str) -> str:
        """A line for people that says how a measure of `METRICS` takes texts apart."""
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
    """The rules of a language, an ISO 639-1 code, or by the letters of the references.

    Letters that are ASCII but for 1 in 200, which names and quotations may have, count as English. A language that
    has no others, such as Indonesian or Swahili, needs its code. Scripts without spaces go to BLEU letter by letter
    (Han by sacrebleu's zh), Japanese too, so that the number does not depend on whether MeCab is installed; with the
    code ja it has to be, as for ko.
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
    """Each named measure of the predictions, in percent.

    Args:
        names: of `METRICS`.
        predictions: one text per example.
        references: of each example, one or several right texts.
        language: of the texts, see `rules_for`.

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
    rules = rules_for(references, language)
    return {name: float(METRICS[name](predictions, references, rules)) for name in names}


# ---- What needs no model ----


def majority_baseline(train_targets: Sequence[str]) -> str:
    """The most frequent target, the first of equals by the alphabet: what to answer to everything."""
    counts = Counter(train_targets)
    return min(counts, key=lambda target: (-counts[target], target))


def copy_baseline(inputs: Sequence[str]) -> list[str]:
    """The inputs as predictions: for translation and corrections, where much stays as it is."""
    return list(inputs)


def lead_baseline(inputs: Sequence[str], num_words: int) -> list[str]:
    """The first words of each input as predictions: for summarization, where they are hard to beat on news.

    A letter is a word in scripts without spaces.
    """
    return [segmentation.first_words(text, num_words) for text in inputs]


# ---- Words ----


def normalize(text: str, *, english: bool) -> str:
    """What of a text counts for exact_match and f1."""
    return segmentation.without_articles(text) if english else segmentation.without_punctuation(text)


def _exact_match(prediction: str, reference: str, rules: Rules) -> float:
    return float(normalize(prediction, english=rules.english) == normalize(reference, english=rules.english))


def _f1(prediction: str, reference: str, rules: Rules) -> float:
    """2 x common words / all words. Where one of them has no words, they must both have none (SQuAD 2.0)."""
    both = [normalize(text, english=rules.english) for text in (prediction, reference)]
    predicted, right = (Counter(text.split() if rules.english else segmentation.words(text)) for text in both)
    if not predicted or not right:  # nothing, or punctuation alone
        return float(both[0] == both[1])
    return 2 * (predicted & right).total() / (predicted.total() + right.total())


def _accuracy(prediction: str, reference: str, _: Rules) -> float:
    prediction, reference = (unicodedata.normalize("NFC", text).strip() for text in (prediction, reference))
    return float(prediction == reference)


def _of_pairs(measure: Callable[[str, str, Rules], float]) -> "Measure":
    """A measure of a set from one of a prediction and a reference."""
    return lambda predictions, references, rules: _best(
        lambda text, each: measure(text, each, rules), predictions, references
    )


def _best(measure: Callable[[str, str], float], predictions: Sequence[str], references: References) -> float:
    """The mean over examples of the best over references, in percent."""
    best = (max(measure(text, each) for each in right) for text, right in zip(predictions, references, strict=True))
    return 100 * sum(best) / len(predictions)


# ---- Packages ----


def _sacrebleu(kind: str, predictions: Sequence[str], references: References, **options: str) -> float:
    try:
        from sacrebleu import metrics
    except ImportError:
        raise _missing(kind.lower(), "sacrebleu") from None
    try:
        measure = getattr(metrics, kind)(**options)
    except RuntimeError:  # its tokenizers of Japanese and Korean call MeCab
        name = options["tokenize"]
        raise ConfigError(
            f"evaluate.metrics='bleu' needs MeCab for {name}; pip install 'sacrebleu[{name[:2]}]', or use "
            "evaluate.language=auto"
        ) from None
    # It wants the first reference of every example, then the second; None where an example has fewer.
    most = max(map(len, references))
    streams = [[right[place] if place < len(right) else None for right in references] for place in range(most)]
    return measure.corpus_score(list(predictions), streams).score


class _Words:
    """What rouge_score asks of a tokenizer."""

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


Measure = Callable[[Sequence[str], References, Rules], float]
METRICS: dict[str, Measure] = {
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
