"""What a training run shows at its end: the question of a row, and its answer."""

import json

import numpy as np
import pytest
from conftest import random_batch, small

from t5like.evaluation.samples import passage, show
from t5like.inference.prompt_format import Prompt
from t5like.train.expected_loss import summary
from t5like.types import Batch


def of(rows, **fields):
    """A batch of one decoder-only row from rows of numbers: read, targets, weights."""
    read, targets, weights = (np.array([row]) for row in rows)
    return Batch(read, targets, weights.astype(np.float32), **{name: np.array([row]) for name, row in fields.items()})


def test_an_encoder_decoder_row_asks_with_its_inputs_and_says_its_targets():
    batch = random_batch(small())
    found = passage(batch)
    assert found.prompt == Prompt(batch.encoder_BS[0].tolist())
    assert found.answer == batch.targets_BL[0][batch.weights_BL[0] > 0].tolist()


def test_of_several_texts_in_a_row_the_first_is_asked():
    pad = np.array([[3, 4, 1, 5, 1, 0]]), np.array([[1, 1, 1, 2, 2, 0]])
    batch = Batch(
        np.array([[0, 7, 0, 9]]), np.array([[7, 1, 9, 1]]), np.ones((1, 4), np.float32), *pad, np.array([[1, 1, 2, 2]])
    )
    assert passage(batch)[0::2] == (Prompt([3, 4, 1]), [7, 1])


def test_a_text_of_which_all_is_learned_goes_on_after_three_quarters():
    found = passage(of(([3, 4, 5, 6, 7, 8, 9, 10], [4, 5, 6, 7, 8, 9, 10, 11], [1] * 8)))
    assert found.prompt == Prompt([3, 4, 5, 6, 7, 8]) and found.answer == [9, 10, 11]
    two = of(([3, 4, 5, 6, 7, 8], [4, 5, 6, 7, 8, 9], [1, 1, 1, 0, 1, 1]), decoder_segments_BL=[1, 1, 1, 1, 2, 2])
    assert passage(two)[0::2] == (Prompt([3, 4, 5]), [6])


def test_an_input_and_its_answer_in_one_sequence_are_parted_at_start():
    batch = of(
        ([3, 4, 1, 0, 7, 8, 5, 0], [0, 0, 0, 7, 8, 1, 0, 9], [0, 0, 0, 1, 1, 1, 0, 1]),
        prefix_BL=[True, True, True, False, False, False, True, False],
        decoder_segments_BL=[1, 1, 1, 1, 1, 1, 2, 2],
    )
    assert passage(batch) == (Prompt([3, 4, 1, 0], 3), [3, 4, 1], [7, 8, 1])


def test_a_conversation_asks_for_its_first_answer():
    batch = of(
        ([0, 3, 1, 7, 1, 4, 1, 8, 0], [3, 1, 7, 1, 4, 1, 8, 1, 0], [0, 0, 1, 1, 0, 0, 1, 1, 0]),
        decoder_segments_BL=[1, 1, 1, 1, 1, 1, 1, 1, 0],
    )
    assert passage(batch) == (Prompt([0, 3, 1]), [3, 1], [7, 1])


@pytest.mark.parametrize("truth", ["plain", "<extra_id_0> b"])
def test_a_passage_shows_truth_and_guess(truth):
    text = show("held-out passage 1", "a <extra_id_0> c", truth, "<extra_id_0> x" if truth[0] == "<" else "guess")
    assert ("filled  'a  x c'" in text) == (truth[0] == "<") and ("guess" in text) == (truth == "plain")


@pytest.mark.parametrize(
    ("records", "line"),
    [
        (
            [{"step": 0, "baseline/uniform": 6.0, "baseline/unigram": 5.0}, {"step": 0, "eval/loss": 6.5}],
            "6.500 untrained, 4.000 after 20 steps (nats per target token; uniform 6.000, unigram 5.000)",
        ),
        ([], "4.000 after 20 steps (nats per target token)"),  # the file was lost on the way
    ],
)
def test_the_summary_says_what_the_metrics_hold(tmp_path, records, line):
    text = "".join(json.dumps(record) + "\n" for record in [*records, {"step": 20, "eval/loss": 4.0}])
    (tmp_path / "metrics.jsonl").write_text(text)
    assert summary(tmp_path, small(), {"config": ""}) == f"held-out loss  {line}"
