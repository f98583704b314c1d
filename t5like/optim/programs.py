"""Compiled programs for batches of several shapes, which packed answers of `t5like rl` have."""

import time
from collections.abc import Callable
from typing import Any

import jax

from t5like.types import TrainState


class ProgramsByShape:
    """A compiled program for each shape of the batch, such as the train step: one at once, others as they are needed.

    Packed answers of `t5like rl` have few shapes; all other batches have one. A program for smaller arrays needs less
    memory, so the first one should be that of the largest.
    """

    def __init__(self, compile_for: Callable[[Any], jax.stages.Compiled], largest: Any):
        """Args: the function from a batch, or its shapes, to a program of (state, batch); the shapes of the first."""
        self._compile, self._programs = compile_for, {}
        self.compile_for(largest)

    def has(self, batch: Any) -> bool:
        """Whether there is a program for batches of these shapes."""
        return _shapes(batch) in self._programs

    def compile_for(self, batch: Any) -> str:
        """Compile the program for batches of these shapes; returns a text about it."""
        begin = time.monotonic()
        self._last = self._programs[_shapes(batch)] = self._compile(batch)
        return f"compiled for rows of another number in {time.monotonic() - begin:.1f} s"

    def __call__(self, state: TrainState, batch: Any) -> Any:
        """Run the program for the batch; compile it before, if there is none."""
        if not self.has(batch):
            self.compile_for(batch)
        self._last = self._programs[_shapes(batch)]
        return self._last(state, batch)

    def as_text(self) -> str:
        """The HLO text of the program that ran last."""
        return self._last.as_text()


def _shapes(batch: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(x.shape for x in jax.tree.leaves(batch))
