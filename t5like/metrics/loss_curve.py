"""Draws loss curves from metrics: loss.png of a run, called by `train` at the end, and several runs in one picture."""

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from t5like.errors import CheckpointError
from t5like.io.atomic import replace_file
from t5like.metrics import writers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE = "loss.png"  # in a run directory
EXPLODED = 3.0  # times the first loss
Records = Sequence[Mapping[str, float | None]]
Points = tuple[list[float], list[float]]  # steps and values


def draw_loss_curve(workdir: Path) -> Path:
    """Draw metrics.jsonl as loss.png in the run directory: training and held-out loss, and the baselines in it.

    The step axis is logarithmic, because loss follows a power law; it is linear up to the first logged step, so that
    step 0 is shown.
    """
    from matplotlib.figure import Figure  # not pyplot: that keeps global state and may look for a display

    records = writers.read(workdir)
    series = lambda name: points(records, name)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    training, heldout = series("train/loss"), series("eval/loss")
    axes.plot(*training, color="tab:blue", linewidth=1, label="training")
    axes.plot(*heldout, color="tab:red", marker="o", markersize=4 if len(heldout[0]) <= 40 else 2, label="held out")
    for name, label in (("baseline/uniform", "uniform guess"), ("baseline/unigram", "unigram frequencies")):
        if values := series(name)[1]:
            axes.axhline(
                values[-1],
                color="gray",
                linestyle=":" if name.endswith("uniform") else "--",
                linewidth=1,
                label=f"{label} {values[-1]:.2f}",
            )
    first, ticks = label_axes(axes, [*training[0], *heldout[0]])
    rates = zip(series("train/tokens_per_second")[1], series("train/step_seconds")[1], strict=False)
    if per_step := statistics.median([rate * seconds for rate, seconds in rates] or [0]) / 1e6:
        tokens = axes.twiny()  # a secondary axis would be linear
        tokens.set_xscale("symlog", linthresh=first, linscale=0.4)
        tokens.set(xlabel="million tokens", xlim=axes.get_xlim())
        tokens.set_xticks(ticks, [f"{x:,.0f}" if (x := tick * per_step) >= 10 else f"{x:.2g}" for tick in ticks])
        tokens.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    replace_file(workdir / PICTURE, png_of(figure), CheckpointError, "move it away")
    return workdir / PICTURE


def png_of(figure: "Figure") -> bytes:
    """A figure as PNG: the bytes of its `savefig`, which draws everything twice."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    return image.getvalue()


def points(records: Records, name: str) -> Points:
    """Return the steps and values of a metric; a value that was not finite is NaN, which leaves a gap."""
    found = [(record["step"], record[name]) for record in records if name in record]
    return [step for step, _ in found], [math.nan if value is None else value for _, value in found]


def has_exploded(losses: Sequence[float]) -> bool:
    """Whether losses, of which the first is that of an untrained model, need a logarithmic axis."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return bool(finite) and min(finite) > 0 and max(finite) > EXPLODED * finite[0]


def label_axes(axes: "Axes", steps: Sequence[float]) -> tuple[float, list[float]]:
    """Scale and label the axes of a loss curve with these steps; return the first step after 0, and the ticks."""
    last = max([*steps, 1])
    first = min([step for step in steps if step > 0], default=1)
    axes.set_xscale("symlog", linthresh=first, linscale=0.4)
    axes.set(xlabel="step", ylabel="loss (nats per target token)", xlim=(0, 1.03 * last))
    digits = (1, 2, 5) if last < 200 * first else (1,)
    ticks = [0, *(digit * 10**power for power in range(len(str(last))) for digit in digits), last]
    axes.set_xticks(ticks := [tick for tick in ticks if tick in (0, last) or first <= tick < 0.8 * last])
    axes.minorticks_off()
    axes.xaxis.set_major_formatter("{x:,.0f}")
    return first, ticks


def draw_loss_curves(runs: Mapping[str, Records], picture: Path) -> None:
    """Draw the loss curves of several runs by name: training as a thin line, held out with markers.

    Runs of `t5like rl` with rewards have a second plot beside it; their loss is no measure and is left out.

    Raises:
        CheckpointError: the picture can't be written.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rewarded = [name for name, records in runs.items() if any("train/reward" in record for record in records)]
    kinds = ["loss"] * (len(rewarded) < len(runs) or not runs) + ["reward"] * bool(rewarded)
    figure = Figure(figsize=(10 if len(kinds) == 1 else 15, 5.5), dpi=120, layout="constrained")
    plots = dict(zip(kinds, figure.subplots(1, len(kinds), squeeze=False)[0], strict=True))
    steps: dict[str, list[float]] = {kind: [0.0] for kind in kinds}
    colors = colormaps["tab10"].colors if len(runs) <= 10 else colormaps["turbo"](range(0, 256, 255 // (len(runs) - 1)))
    for (name, records), color in zip(runs.items(), colors, strict=False):
        kind = "reward" if name in rewarded else "loss"
        training, heldout = points(records, f"train/{kind}"), points(records, f"eval/{kind}")
        plots[kind].plot(*training, color=color, linewidth=0.7, alpha=0.5)
        plots[kind].plot(*heldout, color=color, linewidth=1.2, marker="o", markersize=3, label=name[-60:])
        steps[kind] += [*training[0], *heldout[0]]
        if kind == "loss" and has_exploded([*heldout[1], *training[1]]):
            plots[kind].set_yscale("log")
    for kind, axes in plots.items():
        label_axes(axes, steps[kind])
        axes.set_title("thin: training; markers: held out", fontsize="small", loc="left")
        axes.grid(alpha=0.3)
    if "reward" in plots:
        plots["reward"].set(ylabel="mean reward of an answer")
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    replace_file(picture, png_of(figure), CheckpointError, "use another --output")
