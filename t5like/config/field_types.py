"""Types of config fields: ranges of numbers, which `config.checks` enforces and the help prints."""

import dataclasses
from typing import Annotated


@dataclasses.dataclass(frozen=True)
class Range:
    """Allowed values of a numeric field: closed ends (`least`, `most`) and open ends (`above`, `below`)."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """The range as text, such as ``at least 1 and at most 1,000``."""
        number = lambda end: f"{end:,}" if isinstance(end, int) else f"{end:g}"
        ends = {"at least": self.least, "more than": self.above, "at most": self.most, "less than": self.below}
        return " and ".join(f"{words} {number(end)}" for words, end in ends.items() if end is not None)


LARGEST = 2**31 - 1  # steps and positions are int32
Positive = Annotated[int, Range(1, LARGEST)]
NotNegative = Annotated[int, Range(0, LARGEST)]
Share = Annotated[float, Range(least=0, below=1)]
Rates = Annotated[tuple[float, ...], Range(0, 1e9)]
Axis = Annotated[int, Range(-1, 2**20)]
