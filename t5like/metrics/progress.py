"""Progress on standard error: a bar on a terminal, plain lines elsewhere.

    step 120/600  loss 4.812  31,204 tokens/s  mfu 45.1 %  left 1:32

Used by training, evaluation, generation, and the preparation of data.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from t5like.errors import printable

SECONDS = 5.0  # between plain lines


class Progress:
    """Progress of work whose size is known; a context manager."""

    def __init__(
        self, num_steps: int, *, log_every: int | None = None, step: int = 0, primary: bool = True, unit: str = "step"
    ):
        """Print nothing yet.

        Args:
            num_steps: total number of steps.
            log_every: steps between plain lines; None: a line every `SECONDS`. The last step always has one.
            step: number of steps already done.
            primary: whether this process prints anything.
            unit: name of a step.
        """
        from rich import console, progress  # imported here: processes that tokenize do not need it

        self._num_steps, self._log_every, self._unit = num_steps, log_every, unit
        self._first_step = self._printed = step
        self._shown = time.monotonic()
        self._values: dict[str, float] = {}
        self._primary, self._bar = primary, None
        screen = console.Console(stderr=True)
        if primary and screen.is_terminal:
            self._bar = progress.Progress(
                progress.BarColumn(None),
                progress.TextColumn("{task.description}", markup=False),
                console=screen,
                refresh_per_second=4,
                expand=True,
                redirect_stdout=sys.stdout.isatty(),
            )  # redirect_stdout only on a terminal: piped output must not go to the bar
            self._task = self._bar.add_task(f"{unit} {step}/{num_steps}", total=num_steps, completed=step)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, values: dict[str, float], seconds_left: float | None = None) -> None:
        """Show a completed step; values that are missing keep their last value. May be called for every step."""
        if not self._primary:
            return
        self._values |= values
        text = _line(f"{self._unit} {step}/{self._num_steps}", self._values, seconds_left)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif self._due(step) or step == self._num_steps > self._printed:
            self._printed, self._shown = step, time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def go_back(self, step: int) -> None:
        """Continue after an earlier step."""
        self._printed = step

    def _due(self, step: int) -> bool:
        if self._log_every is None:
            return time.monotonic() - self._shown >= SECONDS
        return step // self._log_every > self._printed // self._log_every

    def timed(self) -> Callable[..., None]:
        """A function to call with the number of completed steps and the values of `update`; it shows the time left."""
        begin = time.monotonic()
        left = lambda done: (time.monotonic() - begin) / (done - self._first_step) * (self._num_steps - done)
        return lambda done, values=None: self.update(done, values or {}, left(done))

    def note(self, text: str) -> None:
        """Print a separate line, such as a held-out loss, above a running bar."""
        if self._primary:
            print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def status(text: str, *, show: bool = True) -> Iterator[None]:
    """Show the current activity where no steps can be counted. Names in `text` may look like markup: it is escaped."""
    from rich import console, markup

    text = printable(text)
    screen = console.Console(stderr=True)
    if show and not screen.is_terminal:
        print(f"{text} ...", file=sys.stderr, flush=True)
    with screen.status(markup.escape(text)) if show and screen.is_terminal else contextlib.nullcontext():
        yield


def _line(prefix: str, values: dict[str, float], seconds_left: float | None) -> str:
    parts = [prefix]
    for name, form in (
        ("train/loss", "loss {:.3f}"),
        ("train/reward", "reward {:.3f}"),
        ("train/tokens_per_second", "{:,.0f} tokens/s"),
    ):
        if name in values:
            parts.append(form.format(values[name]))
    if "train/mfu" in values:
        parts.append(f"mfu {100 * values['train/mfu']:.1f} %")
    if seconds_left is not None:
        minutes, seconds = divmod(round(seconds_left), 60)
        hours, minutes = divmod(minutes, 60)
        parts.append(f"left {hours}:{minutes:02}:{seconds:02}" if hours else f"left {minutes}:{seconds:02}")
    return "  ".join(parts)
