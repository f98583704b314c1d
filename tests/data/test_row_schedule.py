"""The first row of each step: no row is lost or repeated by another batch size, and a rewind passes over rows once."""

import numpy as np
from conftest import small, vocabulary_of

from t5like.data.pipeline import Batches
from t5like.data.row_schedule import RowSchedule, Segment, is_valid


def rows(schedule: RowSchedule, steps: range) -> list[int]:
    """The rows of these steps."""
    size = lambda step: [segment for segment in schedule.segments if segment.step <= step][-1].batch_size
    firsts = [(schedule.first_row(step), size(step)) for step in steps]
    return [row for first, count in firsts for row in range(first, first + count)]


def test_a_run_that_starts_reads_rows_in_order():
    schedule = RowSchedule.of(8)
    assert [schedule.first_row(step) for step in (0, 1, 7)] == [0, 8, 56]
    assert schedule.with_batch_size(5, 8) == schedule and schedule.passed_over() == []


def test_another_batch_size_loses_and_repeats_no_row():
    schedule = RowSchedule.of(8).with_batch_size(10, 12).with_batch_size(13, 4)
    assert rows(schedule, range(20)) == list(range(10 * 8 + 3 * 12 + 7 * 4))
    assert schedule.passed_over() == []


def test_a_rewind_passes_over_the_rows_of_the_steps_behind_its_checkpoint():
    schedule = RowSchedule.of(8).passing_over(10, 13)
    assert rows(schedule, range(12)) == [*range(80), *range(104, 120)]
    assert schedule.passed_over() == [(10, 24)]
    again = schedule.passing_over(10, 12)  # from the same checkpoint: also over the rows of steps 10 and 11 of today
    assert rows(again, range(11)) == [*range(80), *range(120, 128)] and len(again.segments) == 2
    later = schedule.passing_over(14, 15).passing_over(11, 17)  # a checkpoint before the second rewind
    assert rows(later, range(12)) == [*range(80), *range(104, 112), *range(168, 176)]


def test_a_schedule_after_a_rewind_and_another_batch_size_keeps_both():
    schedule = RowSchedule.of(8).passing_over(2, 3).with_batch_size(4, 2)
    assert schedule.segments == (Segment(0, 0, 8), Segment(2, 24, 8), Segment(4, 40, 2))
    assert is_valid([list(segment) for segment in schedule.segments])


def test_damaged_segments_are_recognized():
    good = [[0, 0, 8], [2, 24, 8]]
    assert is_valid(good) and is_valid([[0, 16, 8]])
    for bad in ([], [[1, 0, 8]], good[::-1], [[0, 0]], [[0, 0, 0]], [[0, -1, 8]], [[0, 0.0, 8]], "x", [good[0]] * 2):
        assert not is_valid(bad), bad


class Text:
    """1,009 windows of one token, a prime number, because windows begin at a random offset; token p is 3 + p."""

    num_tokens, num_documents = 1010, 1010

    def windows(self, starts_N, length):
        return ((starts_N[:, None] + np.arange(length)) % self.num_tokens + 3).astype(np.int32)


def test_an_epoch_of_a_prime_number_of_rows_has_each_row_once_whatever_changes_at_its_border():
    data = {"batch_size": 8, "inputs_length": 0, "targets_length": 1}
    config = small(model={"architecture": "decoder"}, data=data, tokenizer={"vocab_size": 2000})
    batches = Batches(config, vocabulary_of(config), [Text()])
    assert batches.num_rows.tolist() == [1009]
    tokens = lambda steps: np.concatenate([batches.at(step).targets_BL[:, 0] for step in steps])
    straight = tokens(range(2 * 127))
    for epoch in (straight[:1009], straight[1009:2018]):
        assert len(set(epoch)) == 1009 and set(epoch) < set(range(3, 1013))
    again = Batches(config, vocabulary_of(config), [Text()])  # as after a restart at the epoch's border, step 126
    assert (again.at(126).targets_BL[:, 0] == straight[126 * 8 : 127 * 8]).all()

    larger = small(model={"architecture": "decoder"}, data={**data, "batch_size": 13}, tokenizer={"vocab_size": 2000})
    continued = Batches(larger, vocabulary_of(larger), [Text()])
    continued.follow(RowSchedule.of(8).with_batch_size(126, 13))
    rest = np.concatenate([continued.at(step).targets_BL[:, 0] for step in range(126, 204)])
    assert (np.concatenate([straight[: 126 * 8], rest])[: 2 * 1009] == straight[: 2 * 1009]).all()
