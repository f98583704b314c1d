"""The first training row of each step: which rows a run passes over, and where its batch size changes.

Rows are numbered over the whole run (`pipeline`). Without a rewind or another batch size, the batch of step s begins
with row s * batch_size. The schedule is saved in each checkpoint's metadata, so that the batch of step s is a pure
function of (config, schedule, s):

    batch_size=8                             steps 9, 10, 11 begin with rows 72, 80, 88
    11 is bad; the run rewinds to step 10    Segment(step=10, row=96, batch_size=8): steps 10, 11 with rows 96, 104
    batch_size=16 from step 20 on            Segment(step=20, row=176, batch_size=16): steps 20, 21 with rows 176, 192

Called by `pipeline`, `checkpoint.metadata` and the training loop.
"""

from typing import Any, NamedTuple


class Segment(NamedTuple):
    """From `step` on, until the next segment: step s begins with row ``row + (s - step) * batch_size``."""

    step: int
    row: int
    batch_size: int


class RowSchedule(NamedTuple):
    """Segments with ascending steps, the first of them 0."""

    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, batch_size: int) -> "RowSchedule":
        """The schedule of a run that starts."""
        return cls((Segment(0, 0, batch_size),))

    def first_row(self, step: int) -> int:
        """The first row of a step's batch."""
        segment = next(segment for segment in reversed(self.segments) if segment.step <= step)
        return segment.row + (step - segment.step) * segment.batch_size

    def with_batch_size(self, step: int, batch_size: int) -> "RowSchedule":
        """Another batch size from a step on; no row is lost or repeated."""
        if self.segments[-1].batch_size == batch_size:
            return self
        return RowSchedule((*self._before(step), Segment(step, self.first_row(step), batch_size)))

    def passing_over(self, step: int, end: int) -> "RowSchedule":
        """For a run that goes back from step `end` to `step`: the rows of steps [step, end) are not used again."""
        return RowSchedule((*self._before(step), Segment(step, self.first_row(end), self.segments[-1].batch_size)))

    def passed_over(self) -> list[tuple[int, int]]:
        """For each rewind that the schedule contains: the step and the number of rows that were passed over."""
        pairs = zip(self.segments[:-1], self.segments[1:], strict=True)
        gaps = [(new.step, new.row - old.row - (new.step - old.step) * old.batch_size) for old, new in pairs]
        return [(step, rows) for step, rows in gaps if rows]

    def _before(self, step: int) -> tuple[Segment, ...]:
        return tuple(segment for segment in self.segments if segment.step < step)


def is_valid(segments: Any) -> bool:
    """Whether a JSON value can be the segments of a schedule."""
    if not isinstance(segments, list) or not all(isinstance(each, list) and len(each) == 3 for each in segments):
        return False
    if not segments or any(type(number) is not int or number < 0 for each in segments for number in each):
        return False
    steps = [step for step, _, _ in segments]
    return steps[0] == 0 and steps == sorted(set(steps)) and all(size for _, _, size in segments)
