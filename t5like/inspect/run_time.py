"""Where the time of a run went, how fast it is, and when it ends: from the metrics of `metrics.time_spent`."""

import math
import statistics
from typing import NamedTuple

from t5like.inspect.run_files import Events, Run
from t5like.metrics.loss_curve import points
from t5like.metrics.time_spent import PARTS, PREFIX

STEP_PARTS = ("data", "inputs", "device", "host")  # of a training step
IDLE = 0.05  # share of a step that waits for the devices, below which they wait for the host
RECENT = 0.25  # of the lines, whose rate predicts the end


class TimeUse(NamedTuple):
    """Sums over all starts of a run.

    Attributes:
        seconds: of each part (`metrics.time_spent.PARTS`) in the lines of the run, without parts that have none.
        synchronous: the host waits for each step before it prepares the next one, as on a CPU.
        line_seconds: median seconds between two lines; 0 if unknown.
        left_seconds: until the last step at the recent rate; None if unknown.
    """

    seconds: dict[str, float]
    synchronous: bool
    line_seconds: float
    left_seconds: float | None

    @property
    def wall(self) -> float:
        """All seconds of all starts, without the time between starts."""
        return math.fsum(self.seconds.values())

    @property
    def running_seconds(self) -> float:
        """The seconds after the starts."""
        return self.wall - self.seconds.get("start", 0.0) - self.seconds.get("undone", 0.0)

    @property
    def step_seconds(self) -> float:
        """The seconds of training steps."""
        return math.fsum(self.seconds.get(part, 0.0) for part in STEP_PARTS)

    @property
    def data_share(self) -> float:
        """The share of the steps' time in which the host waited for data."""
        return self.seconds.get("data", 0.0) / self.step_seconds if self.step_seconds else 0.0

    @property
    def waits_for_data(self) -> bool:
        """Whether waiting for data costs time: not if the devices compute meanwhile."""
        return self.synchronous or self.seconds.get("device", 0.0) < IDLE * self.step_seconds

    @property
    def goodput(self) -> float | None:
        """Productive time, that of steps that were kept and did not wait for data, as a share of all time."""
        if not self.wall:
            return None
        lost = self.seconds.get("data", 0.0) if self.waits_for_data else 0.0
        return (self.step_seconds - lost) / self.wall


def time_use(run: Run, events: Events) -> TimeUse:
    """Add up the time metrics of a run."""
    sums = {part: math.fsum(points(run.records, f"{PREFIX}{part}")[1]) for part in PARTS}
    lines = [record for record in run.records if any(name.startswith(PREFIX) for name in record)]
    spent = [math.fsum(record.get(f"{PREFIX}{part}") or 0.0 for part in PARTS[1:-1]) for record in lines]
    recent = max(2, round(RECENT * len(lines)))
    steps = [int(record["step"]) for record in lines][-recent:]
    left = None
    if len(steps) > 1 and steps[-1] > steps[0]:
        rate = math.fsum(spent[-recent:][1:]) / (steps[-1] - steps[0])
        left = rate * max(run.config.train.num_steps - run.step, 0)
    platforms = [start.get("devices", {}).get("platform") for start in events.starts]
    return TimeUse(
        {part: value for part, value in sums.items() if value},
        platforms[-1:] == ["cpu"],
        statistics.median(spent) if spent else 0.0,
        left,
    )
