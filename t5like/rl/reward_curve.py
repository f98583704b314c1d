"""Draws reward.png of a run of `t5like rl`: what it maximizes, in training and held out, and the KL divergence."""

from pathlib import Path

from t5like.errors import CheckpointError
from t5like.io.atomic import replace_file
from t5like.metrics import writers
from t5like.metrics.loss_curve import png_of, points

PICTURE = "reward.png"  # in a run directory


def draw_reward_curve(workdir: Path, label: str, training: str, heldout: str) -> tuple[Path, str]:
    """Draw metrics.jsonl as reward.png in the run directory; return its path and a line with the result.

    Args:
        workdir: the run directory.
        label: of the vertical axis.
        training, heldout: the metrics that are drawn.

    Held-out rewards have bars of one standard error. The KL divergence per token, if the run has a reference, is dotted
    and has its own axis.
    """
    from matplotlib.figure import Figure  # not pyplot: that keeps global state and may look for a display

    records = writers.read(workdir)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    steps, values = points(records, heldout)
    errors = points(records, "eval/standard_error")[1]
    axes.plot(*points(records, training), color="tab:blue", linewidth=1, label="training")
    axes.errorbar(steps, values, yerr=errors, color="tab:red", marker="o", markersize=4, label="held out")
    axes.set(xlabel="step", ylabel=label)
    kl = points(records, "train/kl")
    if kl[0]:
        right = axes.twinx()
        right.plot(*kl, color="gray", linestyle=":", label="KL")
        right.set(ylabel="KL per token from the first weights (dotted)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    replace_file(workdir / PICTURE, png_of(figure), CheckpointError, "move it away")
    if not values:
        return workdir / PICTURE, f"held-out {label}  none"
    ends = f"{values[0]:.3f} after step {steps[0]:,}, {values[-1]:.3f} after step {steps[-1]:,}"
    return workdir / PICTURE, f"held-out {label}  {ends} (standard error {errors[-1]:.3f})"
