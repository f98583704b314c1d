"""Metrics of labels and numbers, against scipy and against their definitions, written out."""

import numpy as np
import pytest

from t5like.evaluation import label_metrics
from t5like.evaluation.label_metrics import entities, score

LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


@pytest.fixture
def pairs(rng):
    """Predicted and right labels, often equal; label 3 is never predicted, label 5 occurs on neither side."""
    right = rng.choice([0, 1, 2, 3, 6], 200, p=[0.5, 0.2, 0.1, 0.1, 0.1])
    predicted = np.where(rng.random(200) < 0.6, right, rng.choice([0, 1, 2, 6], 200))
    return np.where(predicted == 3, 0, predicted), right


def test_macro_f1_is_the_mean_over_the_labels_that_occur(pairs):
    predicted, right = pairs
    of_labels = []
    for label in (0, 1, 2, 3, 6):
        hits = sum((p == label) and (r == label) for p, r in zip(*pairs, strict=True))
        precision, recall = hits / max((predicted == label).sum(), 1), hits / (right == label).sum()
        of_labels.append(2 * precision * recall / (precision + recall) if hits else 0)
    found = score(["macro_f1", "accuracy"], [predicted], [right], ())
    assert found == pytest.approx({"macro_f1": 100 * np.mean(of_labels), "accuracy": 100 * np.mean(predicted == right)})


def test_the_matthews_correlation_is_that_of_one_hot_labels(pairs):
    def covariance(left, other):  # Gorodkin 2004, equation 3
        return sum(np.cov(left == label, other == label)[0, 1] for label in range(7))

    predicted, right = pairs
    wanted = covariance(*pairs) / np.sqrt(covariance(predicted, predicted) * covariance(right, right))
    assert score(["matthews"], [predicted], [right], ())["matthews"] == pytest.approx(100 * wanted)
    two = (predicted % 2).astype(float), (right % 2).astype(float)  # of two labels it is Pearson's
    assert label_metrics.matthews(*(x.astype(int) for x in two)) == pytest.approx(np.corrcoef(two)[0, 1])
    assert label_metrics.matthews(np.zeros(4, int), np.arange(4)) == 0


def test_correlations_equal_those_of_scipy_with_ties(rng):
    from scipy import stats  # here: it takes long to import

    predicted, right = rng.normal(size=100).round(1), rng.normal(size=100).astype(np.float32)
    right = (right + predicted).round(1)
    found = score(["pearson", "spearman"], [predicted], [right], ())
    wanted = stats.pearsonr(predicted, right).statistic, stats.spearmanr(predicted, right).statistic
    assert list(found.values()) == pytest.approx([100 * each for each in wanted], rel=1e-9)
    assert label_metrics.spearman(np.ones(5), np.arange(5)) == 0  # where scipy has no number


def test_entities_begin_and_end_as_conlleval_reads_them():
    assert entities(["O", "B-PER", "I-PER", "I-LOC", "B-LOC"]) == [(1, 3, "PER"), (3, 4, "LOC"), (4, 5, "LOC")]
    assert entities(["I-PER", "O", "I-PER", "B-PER"]) == [(0, 1, "PER"), (2, 3, "PER"), (3, 4, "PER")]


def test_entity_f1_counts_entities_of_all_texts_with_borders_and_type():
    right = [np.array([1, 2, 0]), np.array([0, 3]), np.array([0])]
    predicted = [np.array([1, 2, 0]), np.array([0, 1]), np.array([3])]  # 1 of 2 right, 1 of 3 predictions
    assert score(["entity_f1"], predicted, right, LABELS)["entity_f1"] == pytest.approx(100 * 2 * 1 / (2 + 3))
    shifted = [np.array([1, 0, 0]), *predicted[1:]]
    assert score(["entity_f1"], shifted, right, LABELS)["entity_f1"] == 0
    with pytest.raises(ValueError, match="as many labels"):
        score(["entity_f1"], predicted[:2], right, LABELS)
