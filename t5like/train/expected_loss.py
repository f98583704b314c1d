"""The result of a run, compared with the held-out losses of known runs of the same config on the same text.

`EXPECTED` is data, not a rule of training: update it, and the table in benchmarks/RESULTS.md, when a preset changes or
another machine has another result. A run is recognized by its fingerprints (`provenance`), not by its name: the
standard library of another Python version is another text, and has another expected loss. Called by `loop`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5like.config.schema import Config
from t5like.metrics import writers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
    """The range of held-out losses, in nats per target token, of one config on one text after so many steps."""

    name: str
    config: str  # fingerprints of `provenance.fingerprints`
    tokenizer: str
    stores: tuple[str, ...]
    num_steps: int
    low: float
    high: float


EXPECTED = (
    Expected(
        name="configs/tiny.py on the standard library of Python 3.11.7",
        config="360e931fe96b",
        tokenizer="e7cb331c0920",
        stores=("583eaa8c6437",),
        num_steps=900,
        low=2.87,
        high=3.2,
    ),
)


def verdict(prints: Mapping[str, Any], num_steps: int, loss: float, known: tuple[Expected, ...]) -> str:
    """Return a line about whether a run's held-out loss is expected; empty for a config without expected loss.

    Args:
        prints: `provenance.fingerprints` of the run.
        loss: after `num_steps`, in nats per target token.
    """
    same_config = [each for each in known if (each.config, each.num_steps) == (prints["config"], num_steps)]
    if not same_config:
        return ""
    text = (prints["tokenizer"], tuple(prints["stores"].values()))
    for each in same_config:
        if (each.tokenizer, each.stores) == text:
            between = f"{each.low:.2f} to {each.high:.2f}"
            if each.low <= loss <= each.high:
                return f"expected   {between}: this run's {loss:.3f} is within the range"
            return (
                f"WARNING    {loss:.3f} is outside the expected range {between} of {each.name}; "
                'see "What `make train` ends at" in benchmarks/RESULTS.md'
            )
    stored = "; ".join(each.name for each in same_config)
    return f"expected   no range is stored for this tokenizer and text, only for {stored}"


def summary(workdir: Path, config: Config, prints: Mapping[str, Any]) -> str:
    """Return the run's result, read from its metrics file, and the expected loss, as lines to print.

    Args:
        prints: `provenance.fingerprints` of the run.
    """
    records = writers.read(workdir)
    losses = [(each["step"], each["eval/loss"]) for each in records if each.get("eval/loss") is not None]
    if not losses:
        return "held-out loss  not finite"
    baselines = [(each.get("baseline/uniform"), each.get("baseline/unigram")) for each in records]
    known = next((f"; uniform {each[0]:.3f}, unigram {each[1]:.3f}" for each in baselines if None not in each), "")
    untrained = f"{losses[0][1]:.3f} untrained, " if losses[0][0] == 0 else ""
    units = {None: "nats per target token", "regression": "squared error"}
    unit = units.get(config.data.label_objective, "nats per label")
    lines = [
        f"held-out loss  {untrained}{losses[-1][1]:.3f} after {config.train.num_steps:,} steps ({unit}{known})",
        verdict(prints, config.train.num_steps, losses[-1][1], EXPECTED),
    ]
    return "\n".join(filter(None, lines))
