"""The samples that a training run shows at its end: the prompt and target of a row, and the text of a sample."""

import json

import numpy as np
import pytest
from conftest import random_batch, small

from t5like.evaluation.samples import first_example, show
from t5like.inference.prompt_format import Prompt
from t5like.train.expected_loss import summary
from t5like.types import Batch


def batch_of(rows, **fields):
    """A batch of one decoder-only row from lists of numbers: inputs, targets, weights."""
    inputs, targets, weights = (np.array([row]) for row in rows)
    return Batch(inputs, targets, weights.astype(np.float32), **{name: np.array([row]) for name, row in fields.items()})


def test_the_prompt_of_an_encoder_decoder_row_is_its_inputs():
    batch = random_batch(small())
    example = first_example(batch)
    assert example.prompt == Prompt(batch.encoder_BS[0].tolist())
    assert example.target == batch.targets_BL[0][batch.weights_BL[0] > 0].tolist()


def test_the_first_of_several_texts_in_a_row_is_used():
    pad = np.array([[3, 4, 1, 5, 1, 0]]), np.array([[1, 1, 1, 2, 2, 0]])
    batch = Batch(
        np.array([[0, 7, 0, 9]]), np.array([[7, 1, 9, 1]]), np.ones((1, 4), np.float32), *pad, np.array([[1, 1, 2, 2]])
    )
    assert first_example(batch)[0::2] == (Prompt([3, 4, 1]), [7, 1])


def test_three_quarters_of_a_text_without_inputs_are_the_prompt():
    example = first_example(batch_of(([3, 4, 5, 6, 7, 8, 9, 10], [4, 5, 6, 7, 8, 9, 10, 11], [1] * 8)))
    assert example.prompt == Prompt([3, 4, 5, 6, 7, 8]) and example.target == [9, 10, 11]
    two = batch_of(([3, 4, 5, 6, 7, 8], [4, 5, 6, 7, 8, 9], [1, 1, 1, 0, 1, 1]), decoder_segments_BL=[1, 1, 1, 1, 2, 2])
    assert first_example(two)[0::2] == (Prompt([3, 4, 5]), [6])


def test_an_input_and_its_target_in_one_sequence_are_split_at_the_start_token():
    batch = batch_of(
        ([3, 4, 1, 0, 7, 8, 5, 0], [0, 0, 0, 7, 8, 1, 0, 9], [0, 0, 0, 1, 1, 1, 0, 1]),
        prefix_BL=[True, True, True, False, False, False, True, False],
        decoder_segments_BL=[1, 1, 1, 1, 1, 1, 2, 2],
    )
    assert first_example(batch) == (Prompt([3, 4, 1, 0], 3), [3, 4, 1], [7, 8, 1])


def test_the_target_of_a_conversation_is_its_first_answer():
    batch = batch_of(
        ([0, 3, 1, 7, 1, 4, 1, 8, 0], [3, 1, 7, 1, 4, 1, 8, 1, 0], [0, 0, 1, 1, 0, 0, 1, 1, 0]),
        decoder_segments_BL=[1, 1, 1, 1, 1, 1, 1, 1, 0],
    )
    assert first_example(batch) == (Prompt([0, 3, 1]), [3, 1], [7, 1])


@pytest.mark.parametrize("truth", ["plain", "<extra_id_0> b"])
def test_a_passage_shows_target_and_prediction(truth):
    text = show("held-out passage 1", "a <extra_id_0> c", truth, "<extra_id_0> x" if truth[0] == "<" else "guess")
    assert ("filled  'a  x c'" in text) == (truth[0] == "<") and ("guess" in text) == (truth == "plain")


@pytest.mark.parametrize(
    ("records", "line"),
    [
        (
            [{"step": 0, "baseline/uniform": 6.0, "baseline/unigram": 5.0}, {"step": 0, "eval/loss": 6.5}],
            "6.500 untrained, 4.000 after 20 steps (nats per target token; uniform 6.000, unigram 5.000)",
        ),
        ([], "4.000 after 20 steps (nats per target token)"),  # without the file
    ],
)
def test_the_summary_shows_the_values_of_the_metrics_file(tmp_path, records, line):
    text = "".join(json.dumps(record) + "\n" for record in [*records, {"step": 20, "eval/loss": 4.0}])
    (tmp_path / "metrics.jsonl").write_text(text)
    assert summary(tmp_path, small(), {"config": ""}) == f"held-out loss  {line}"
