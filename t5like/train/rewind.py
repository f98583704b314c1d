"""What a run does after bad steps: go back to a checkpoint, pass over the batches that led there, or end.

A step is bad if its update is not finite or is a spike (`optim.bad_steps` decides that inside the train step). After
`train.max_skipped_updates` bad steps in a row, the run continues from the newest checkpoint before the first of them
with the rows after the last one (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1, did this by hand). It does the
same if the state is not finite when it is to be saved, for example if only a second moment is infinite, which makes no
update bad. After `train.max_rewinds` rewinds, or without such a checkpoint, it ends with exit code 5.

All of this is a function of the metrics and of the checkpoint's `History`. So a run that is killed at any time repeats
the same decisions. Called by `loop` and `report`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from t5like.checkpoint.checkpoints import Checkpoints
from t5like.checkpoint.metadata import History
from t5like.config.schema import Config
from t5like.data import pipeline
from t5like.data.pipeline import StepBatches
from t5like.distributed import processes
from t5like.errors import Diverged, shorten
from t5like.metrics.time_spent import TimeSpent


class BadSteps:
    """Counts bad steps in a row, and decides where to continue.

    Attributes:
        history: of the current state, for its checkpoint.
        last: the step of the last bad one, and what was wrong.
    """

    def __init__(self, config: Config, history: History):
        self._train, self._learning_rate = config.train, config.optimizer.learning_rate
        self.history, self.last = history, (0, "")
        self._updates = config.rl.updates_per_rollout

    def observe(self, done: int, values: Mapping[str, float]) -> str | None:
        """Take the metrics of a completed step; return what is wrong with it, or None."""
        reason = describe(values)
        self.history = self.history._replace(bad_steps=self.history.bad_steps + 1 if reason else 0)
        self.last = (done, reason) if reason else self.last
        return reason

    def observe_state(self, done: int, names: Sequence[str]) -> str:
        """Take the names of the leaves of a state that are not finite; returns what is wrong, as `observe`."""
        reason = f"the state is not finite in {shorten(names)}"
        self.history = self.history._replace(bad_steps=max(self.history.bad_steps, 1))
        self.last = (done, reason)
        return reason

    @property
    def too_many(self) -> bool:
        """Whether the run must rewind."""
        return self.history.bad_steps >= self._train.max_skipped_updates

    def rewind(self, checkpoints: Checkpoints) -> int:
        """Go back: choose the checkpoint, delete later ones, and change the history. All processes call it.

        Returns:
            The step of the checkpoint.

        Raises:
            Diverged: there is no checkpoint before the bad steps, or the run has gone back too often.
        """
        checkpoints.wait()
        done, reason = self.last
        count = self.history.bad_steps
        good = [step for step in checkpoints.steps() if 0 < step <= done - count]
        target = int(processes.broadcast("rewinding", str(max(good, default=0))))
        if not target or self.history.rewinds >= self._train.max_rewinds:
            why = "there is no checkpoint before them"
            if target:
                why = f"the run has gone back {self.history.rewinds} times (train.max_rewinds)"
            steps = "a bad step" if count == 1 else f"{count} bad steps in a row"
            rate = f"{self._learning_rate / 2:g}"
            raise Diverged(
                f"{steps} up to step {done:,}: {reason}; {why}; lower optimizer.learning_rate, "
                f"as in --config.optimizer.learning_rate={rate} --allow_change=optimizer.learning_rate, or raise "
                "optimizer.warmup_steps"
            )
        checkpoints.delete_after(target)
        end = -(-done // self._updates) * self._updates  # the steps of a rollout share its prompts
        rows, rewinds = self.history.rows.passing_over(target, end), self.history.rewinds + 1
        self.history = self.history._replace(rows=rows, rewinds=rewinds, bad_steps=0)
        return target


def describe(values: Mapping[str, float]) -> str | None:
    """What is wrong with a step, by its metrics; None if nothing is."""
    if not values["train/skipped_updates"] and not values.get("train/spikes"):
        return None
    for name, text in (("train/loss", "the loss"), ("train/grad_norm", "the gradient")):
        if not math.isfinite(values[name]):
            return f"{text} is not finite"
    if values.get("train/spikes"):
        return f"loss {values['train/loss']:.3f} and gradient norm {values['train/grad_norm']:.3g} are a spike"
    return "the update is not finite, although loss and gradient are"


class TrainingBatches:
    """An iterator over (step, batch) that can continue from another step; batches are made ahead in a thread."""

    def __init__(self, batches: StepBatches, start: int, stop: int, rows, spent: TimeSpent):
        """Steps [start, stop); `rows`: see `Batches.at`; `spent` measures the time of waiting."""
        self._batches, self._stop, self._rows, self._spent = batches, stop, rows, spent
        self.go_to(start)

    def go_to(self, step: int) -> None:
        """Continue with this step; call it again after the rows of `batches` have changed."""
        self._step = step
        self._ahead = pipeline.prefetch(self._batches, step, self._stop, self._rows)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return self

    def __next__(self) -> tuple[int, Any]:
        with self._spent.of("data"):
            batch = next(self._ahead)
        self._step += 1
        return self._step - 1, batch
