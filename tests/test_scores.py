"""Measures of predicted texts, against values worked out by hand from their papers."""

import math
import sys
from typing import get_args

import pytest

from t5like import config_file
from t5like.config import Metric
from t5like.errors import ConfigError
from t5like.scores import METRICS, copy_baseline, lead_baseline, majority_baseline, normalize, score


def one(name, prediction, *references):
    return score([name], [prediction], [references])[name]


@pytest.mark.parametrize(
    "text, normal",
    [
        ("The Broncos", "broncos"),
        ("a  CAT,\tan owl & the  dog.", "cat owl dog"),
        ("theater another", "theater another"),  # articles only as words
        ("The U.S.A.'s  end", "usas end"),
        ("«Élan» — Straße", "«élan» — straße"),  # only ASCII punctuation goes
        ("state-of-the-art", "stateoftheart"),  # punctuation goes first, so no article is left
        ("the", ""),
    ],
)
def test_normalisation_is_that_of_squad(text, normal):
    assert normalize(text) == normal


def test_the_best_reference_counts():
    assert one("exact_match", "the Denver Broncos!", "Carolina Panthers", "Denver Broncos") == 100
    # 2 of 2 predicted words in 3 of the first reference: 2 * 2 / (2 + 3); 1 in 1 of the second: 2 * 1 / (2 + 1).
    assert one("f1", "the Denver Broncos", "Denver Broncos team", "Broncos") == pytest.approx(80)


def test_f1_counts_a_repeated_word_as_often_as_both_have_it():
    assert one("f1", "b b b", "b b c") == pytest.approx(100 * 2 * 2 / 6)


@pytest.mark.parametrize("prediction, reference, value", [("", "", 100), ("the", "", 100), ("", "x", 0), ("x", "a", 0)])
def test_without_words_both_must_have_none(prediction, reference, value):
    assert one("f1", prediction, reference) == one("exact_match", prediction, reference) == value


def test_accuracy_minds_case_and_punctuation_but_not_outer_spaces():
    assert one("accuracy", " yes\n", "yes") == 100
    assert one("accuracy", "Yes", "yes") == one("accuracy", "yes.", "yes") == 0


def test_scores_are_means_over_examples_in_any_order():
    predictions, references = ["a b", "x", "q r s t u", ""], [["b"], ["y"], ["q r s t v"], ["z"]]
    names = ["exact_match", "f1", "accuracy"]
    values = score(names, predictions, references)
    assert values == pytest.approx({"exact_match": 25, "f1": (100 + 0 + 80 + 0) / 4, "accuracy": 0})
    assert score(names, predictions[::-1], references[::-1]) == pytest.approx(values)


def test_bleu_is_the_geometric_mean_of_precisions_times_the_brevity_penalty():
    # 5 of 6 words, 4 of 5, 3 of 4 and 2 of 3 runs are right, and nothing is short.
    assert one("bleu", "a b c d e x", "a b c d e f") == pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    # All right, 5 words of 7.
    assert one("bleu", "a b c d e", "a b c d e f g") == pytest.approx(100 * math.exp(1 - 7 / 5))
    assert one("bleu", "", "a b c d") == 0
    # Right and all runs are added over the corpus, then divided: it is no mean over texts.
    both = score(["bleu"], ["a b c d e f", "q r s t"], [["a b c d e f"], ["q r x t"]])["bleu"]
    assert both == pytest.approx(100 * (9 / 10 * 6 / 8 * 4 / 6 * 3 / 4) ** 0.25)


def test_bleu_takes_several_references_of_different_number():
    values = score(["bleu"], ["a b c d", "e f g h"], [["x y z w", "a b c d"], ["e f g h"]])
    assert values["bleu"] == pytest.approx(100)


def test_chrf_of_equal_texts_is_100_and_of_disjoint_ones_0():
    assert one("chrf", "für Äpfel", "für Äpfel") == pytest.approx(100)
    assert one("chrf", "abc", "xyz") == 0


def test_rouge_is_the_f_measure_of_stemmed_words():
    # police kill the gunman / police killed the gunman (Lin 2004, section 3): with a stemmer, the same.
    assert one("rouge1", "police kill the gunman", "police killed the gunman") == pytest.approx(100)
    # "the gunman kill police": 1 of 3 pairs is right, and the longest common subsequence has 2 of 4 words.
    assert one("rouge2", "the gunman kill police", "police killed the gunman") == pytest.approx(100 / 3)
    assert one("rougeL", "the gunman kill police", "police killed the gunman") == pytest.approx(50)
    # 2 of 2 words, 2 of 4: F = 2 * 1 * 0.5 / 1.5.
    assert one("rouge1", "police kill", "police killed the gunman") == pytest.approx(200 / 3)
    assert one("rougeL", "", "police") == one("rouge1", "police", "") == 0


def test_rouge_l_takes_the_whole_text_as_one_sequence():
    assert one("rougeL", "c d\na b", "a b\nc d") == pytest.approx(50)  # rougeLsum would give 100


def test_a_majority_does_not_depend_on_order():
    assert majority_baseline(["b", "a", "b", "a", "c"]) == majority_baseline(["a", "c", "a", "b", "b"]) == "a"


def test_baselines_read_only_the_input():
    assert lead_baseline(["one  two\nthree four", ""], 3) == ["one two three", ""]
    assert copy_baseline(("x y",)) == ["x y"]


def test_a_name_or_package_that_is_not_there_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="evaluate.metrics='rogue1' must be one of exact_match, .* rougeL"):
        score(["rogue1"], ["x"], [["x"]])
    for name in ("sacrebleu", "rouge_score", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("bleu", "chrf", "rouge1", "rouge2", "rougeL"):
        with pytest.raises(ConfigError, match=f"evaluate.metrics='{name}' needs the package .*; pip install 't5like"):
            score([name], ["x"], [["x"]])


def test_the_schema_knows_every_measure_and_refuses_what_has_no_answer():
    assert get_args(Metric) == tuple(METRICS)
    supervised = {"data": {"objective": "supervised"}}
    config = config_file.resolve({**supervised, "evaluate": {"metrics": list(METRICS), "choices": ["yes", "no"]}})
    assert config.evaluate.metrics == tuple(METRICS)
    with pytest.raises(ConfigError, match="evaluate.metrics='rouge' must be one of .*; did you mean 'rouge"):
        config_file.resolve({**supervised, "evaluate": {"metrics": ["rouge"]}})
    with pytest.raises(ConfigError, match="evaluate.metrics=.* need data.objective=supervised"):
        config_file.resolve({"evaluate": {"metrics": ["f1"]}})
    for choices in (["yes"], ["yes", "yes"]):
        with pytest.raises(ConfigError, match="evaluate.choices=.* at least two different answers, or empty"):
            config_file.resolve({**supervised, "evaluate": {"choices": choices}})
    with pytest.raises(ConfigError, match="evaluate.max_new_tokens=-1 must be at least 0"):
        config_file.resolve({"evaluate": {"max_new_tokens": -1}})


@pytest.mark.parametrize("predictions, references", [([], []), (["x"], []), (["x"], [[]]), (["x"], ["x"])])
def test_what_does_not_go_together_is_refused(predictions, references):
    with pytest.raises(ValueError, match="references"):
        score(list(METRICS)[:1], predictions, references)
