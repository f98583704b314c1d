"""Whether a run is healthy: rules over its metrics and events, each with a number, the rule and a remedy.

The rules use only what a run directory holds. Their limits are constants here; docs/debugging.md lists them. Called by
`inspect.run` and `inspect.run_page`.
"""

import math
import shlex
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from t5like.errors import shorten
from t5like.inspect.run_files import Events, Run, state
from t5like.inspect.run_time import TimeUse
from t5like.metrics import writers
from t5like.metrics.loss_curve import points

WINDOWS = 8  # into which the steps are divided to find a trend
RISE = 1.05  # loss of the last window over the best one
OVER_UNIFORM = 1.02  # loss over that of a uniform guess
FEWEST_STEPS = 20  # below it, rates and trends say nothing
SKIPPED_SHARE = 0.01  # of the steps
GRADIENT_RISE = 10.0  # of the last window over the median
LARGEST_RATIO = 1e6  # above it the parameter was 0, as one that starts at 0
UPDATE_RATIO = 0.1  # norm of an update over that of its parameter; 1e-3 is common
DATA_SHARE = 0.2  # of the time of steps
SAVE_SHARE, EVALUATE_SHARE = 0.1, 0.3  # of the time after the start
SHORTEST_SECONDS = 120.0  # of a run whose saves and evaluations are judged
SLOWER = 0.75  # speed of the last window over the median
SILENT_LINES = 10  # times between two lines of a running run, without a new line
FAILED_REWARDS = 0.05  # of all rewards
EQUAL_REWARDS = 0.9  # share of prompts whose answers all have the same reward


class Finding(NamedTuple):
    """Something that is wrong, or may be.

    Attributes:
        kind: ``bad`` or ``warning``.
        what: in words, with the number.
        rule: the limit that it is compared with.
        remedy: what to change.
    """

    kind: Literal["bad", "warning"]
    what: str
    rule: str
    remedy: str


def findings(run: Run, events: Events, use: TimeUse) -> list[Finding]:
    """Apply all rules; the worst findings come first."""
    found = [
        *_updates(run, events),
        *_loss(run),
        *_gradients(run),
        *_speed(run, use),
        *_checkpoints(run, events),
        *_rewards(run),
    ]
    return sorted(found, key=lambda finding: finding.kind != "bad")


def verdict(run: Run, found: Sequence[Finding]) -> str:
    """One sentence: whether the run is healthy."""
    bad = sum(finding.kind == "bad" for finding in found)
    warnings = len(found) - bad
    count = lambda number, name: f"{number} {name}{'s' if number != 1 else ''}"
    parts = [count(number, name) for number, name in ((bad, "problem"), (warnings, "warning")) if number]
    if not found and run.step < FEWEST_STEPS:
        return f"nothing is wrong so far, but {run.step} steps say little" if run.records else "no metrics yet"
    if not found:
        return "healthy"
    return ("not healthy: " if bad else "healthy, but ") + " and ".join(parts)


def window_medians(values: Sequence[float]) -> list[float]:
    """Medians of `WINDOWS` parts of a series, without values that are not finite; empty if it is too short."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < WINDOWS:
        return []
    edges = [round(index * len(finite) / WINDOWS) for index in range(WINDOWS + 1)]
    return [statistics.median(finite[low:high]) for low, high in zip(edges, edges[1:], strict=False)]


def noise(values: Sequence[float]) -> float:
    """How much the medians of two windows differ by chance: six standard errors of a median, from neighbours."""
    finite = [value for value in values if math.isfinite(value)]
    steps = [abs(after - before) for before, after in zip(finite, finite[1:], strict=False)]
    if not steps:
        return math.inf
    deviation = 1.05 * statistics.median(steps)  # of normal noise: the median difference is 0.954 deviations
    return 6 * 1.25 * deviation / math.sqrt(max(len(finite) // WINDOWS, 1))


def trend(values: Sequence[float]) -> str:
    """``falling``, ``flat`` or ``rising``, by the medians of the last two windows; empty if unknown.

    Flat is a change by less than 1 %, or by less than chance.
    """
    medians = window_medians(values)
    if not medians:
        return ""
    change = medians[-1] - medians[-2]
    if abs(change) < max(0.01 * abs(medians[-2]), noise(values) / 2):
        return "flat"
    return "falling" if change < 0 else "rising"


# ---- Rules ----


def _updates(run: Run, events: Events) -> Iterator[Finding]:
    """Skipped updates, spikes and rewinds."""
    train = run.config.train
    lower = f"{_lower_rate(run, 3)} or raise optimizer.warmup_steps"
    skipped = _steps_with(run, "train/skipped_updates")
    spikes = [step for step in _steps_with(run, "train/spikes") if step not in skipped]
    if state(run) == "diverged":
        reason = events.bad_steps.get(run.step, "loss, gradient or update are not finite, or a spike")
        yield Finding(
            "bad",
            f"the run diverged at step {run.step:,}: {reason}",
            f"{train.max_skipped_updates} bad steps in a row (train.max_skipped_updates)",
            lower,
        )
    elif skipped:
        share = len(skipped) / max(run.step, 1)
        yield Finding(
            "bad" if share > SKIPPED_SHARE else "warning",
            f"{len(skipped)} updates were skipped ({share:.1%} of the steps): steps {_shown(skipped)}",
            f"a skipped update trains nothing; more than {SKIPPED_SHARE:.0%} is a problem",
            f"{lower}; t5like replay --workdir={shlex.quote(str(run.path))} --step={skipped[0]} names the first "
            "operation",
        )
    if spikes:
        yield Finding(
            "warning",
            f"{len(spikes)} steps were spikes: {_shown(spikes)}",
            f"loss or gradient norm above {train.spike_factor:g} times the median (train.spike_factor)",
            lower,
        )
    if events.history is not None and events.history.rewinds:
        count = events.history.rewinds
        yield Finding(
            "bad" if count >= train.max_rewinds else "warning",
            f"the run went back to an earlier checkpoint {count} {'time' if count == 1 else 'times'}",
            f"after {train.max_rewinds} rewinds it ends (train.max_rewinds)",
            f"{lower}; look at the rows in {run.path / 'bad_steps'}",
        )


def _loss(run: Run) -> Iterator[Finding]:
    """A loss that rises, that is worse than a guess, or that overfits. A loss of sampled answers has no such rules."""
    if run.config.rl.method != "none":
        return
    lower = _lower_rate(run, 10)
    (_, trained), (steps, heldout) = points(run.records, "train/loss"), points(run.records, "eval/loss")
    medians = window_medians(trained)
    last = heldout[-1] if steps and steps[-1] else (medians or [math.nan])[-1]
    uniform, unigram = (_last(run, f"baseline/{name}") for name in ("uniform", "unigram"))
    if run.step >= FEWEST_STEPS and uniform is not None and last > OVER_UNIFORM * uniform:
        yield Finding(
            "bad",
            f"the loss is {last:.3f}, above the {uniform:.3f} of a uniform guess",
            f"a model that learns nothing has the loss of a guess; more than {OVER_UNIFORM:g} times it is divergence",
            f"{lower}, or check the tokenizer and the targets with t5like inspect data",
        )
    elif run.step >= 5 * FEWEST_STEPS and unigram is not None and last > unigram:
        yield Finding(
            "warning",
            f"the loss is {last:.3f}, not below the {unigram:.3f} of guessing by token frequency",
            f"after {5 * FEWEST_STEPS} steps a model knows more than frequencies",
            "raise or lower optimizer.learning_rate by 3, and see whether the model can learn K batches by heart",
        )
    rose = bool(medians) and medians[-1] > max(RISE * min(medians[:-1]), min(medians[:-1]) + noise(trained))
    if rose and not run.config.data.phase_boundaries:
        yield Finding(
            "bad",
            f"the training loss rose from {min(medians[:-1]):.3f} to {medians[-1]:.3f}",
            f"the median of the last eighth of the steps is {RISE - 1:.0%}, and more than chance, over the lowest",
            f"{lower}, or raise optimizer.warmup_steps",
        )
    best = min((value for value in heldout if math.isfinite(value)), default=math.nan)
    if len(heldout) >= 4 and heldout[-1] > RISE * best and not rose:
        yield Finding(
            "warning",
            f"the held-out loss rose from {best:.3f} to {heldout[-1]:.3f} while the training loss did not",
            f"more than {RISE - 1:.0%} above its best value: the run overfits",
            "stop earlier, use more data, or raise model.dropout_rate",
        )


def _gradients(run: Run) -> Iterator[Finding]:
    """Gradient norms that grow, and updates that are large for their parameters."""
    rate = run.config.optimizer.learning_rate
    _, norms = points(run.records, "train/grad_norm")
    medians = window_medians(norms)
    if medians and medians[-1] > GRADIENT_RISE * statistics.median(medians):
        yield Finding(
            "warning",
            f"the gradient norm rose to {medians[-1]:.3g}, from {statistics.median(medians):.3g}",
            f"more than {GRADIENT_RISE:g} times its median",
            f"lower optimizer.learning_rate ({rate:g}), or optimizer.clip_norm ({run.config.optimizer.clip_norm:g})",
        )
    ratios = {name: value for name, value in last_update_ratios(run).items() if value > UPDATE_RATIO}
    if ratios:
        name = max(ratios, key=lambda each: ratios[each])
        most = f"most {layer_of(name)}: {ratios[name]:.2g} of its norm"
        yield Finding(
            "bad",
            f"an update changes {len(ratios)} parameters by much, {most}",
            f"update/parameter ratio above {UPDATE_RATIO:g}; 0.001 is common",
            f"{_lower_rate(run, 10)}, or raise optimizer.warmup_steps",
        )


def _speed(run: Run, use: TimeUse) -> Iterator[Finding]:
    """Time that does not train: waiting for data, saving, evaluating; a speed that fell; a run that is silent."""
    train, data = run.config.train, run.config.data
    if run.step >= FEWEST_STEPS and use.waits_for_data and use.data_share > DATA_SHARE:
        yield Finding(
            "bad",
            f"steps wait for data {use.data_share:.0%} of their time",
            f"more than {DATA_SHARE:.0%}" + ("" if use.synchronous else ", and the devices are idle meanwhile"),
            f"raise data.num_workers ({data.num_workers}) or data.prefetch ({data.prefetch}), or move "
            "data.cache_directory to a local disk",
        )
    if use.running_seconds > SHORTEST_SECONDS:
        for part, limit, field, value in (
            ("save", SAVE_SHARE, "train.checkpoint_every", train.checkpoint_every),
            ("evaluate", EVALUATE_SHARE, "train.eval_every", train.eval_every),
        ):
            share = use.seconds.get(part, 0.0) / use.running_seconds
            if share > limit:
                yield Finding(
                    "warning",
                    f"{share:.0%} of the time goes into {part}",
                    f"more than {limit:.0%}",
                    f"raise {field} ({value}; try {2 * value})",
                )
    rates = points(run.records, "train/tokens_per_second")[1]
    medians = window_medians(rates)
    if medians and medians[-1] < SLOWER * statistics.median(medians):
        yield Finding(
            "warning",
            f"the speed fell from {statistics.median(medians):,.0f} to {medians[-1]:,.0f} tokens/s",
            f"the last eighth of the steps is below {SLOWER:.0%} of the median",
            "look for other processes on the machine, hot devices, or slow storage",
        )
    if run.is_running and use.line_seconds and run.records:
        silent = time.time() - (run.path / writers.FILE).stat().st_mtime
        if silent > max(SILENT_LINES * use.line_seconds, 60):
            yield Finding(
                "warning",
                f"the run is running, but has written no metrics for {silent / 60:.0f} minutes",
                f"a line every {use.line_seconds:.0f} s before; {SILENT_LINES} times that is too long",
                "look at its last output; it may evaluate, save, or wait for another process",
            )


def _checkpoints(run: Run, events: Events) -> Iterator[Finding]:
    """Checkpoints that are damaged or missing."""
    damaged = [row.step for row in events.checkpoints if row.damaged]
    if damaged:
        yield Finding(
            "bad",
            f"damaged checkpoints: steps {_shown(damaged)}",
            "a checkpoint must match its digests",
            f"t5like inspect checkpoint --workdir={shlex.quote(str(run.path))} --verify shows which are good",
        )
    every = run.config.train.checkpoint_every
    if run.step > 2 * every and not events.checkpoints:
        yield Finding(
            "bad",
            f"no checkpoint after {run.step:,} steps",
            f"one every {every:,} steps (train.checkpoint_every)",
            "look for errors of storage in the run's output",
        )


def _rewards(run: Run) -> Iterator[Finding]:
    """Rewards of `t5like rl` that fall, fail or are equal, and a KL divergence near its limit."""
    if run.config.rl.method != "policy":
        return
    rl = run.config.rl
    kl, equal = _last(run, "train/kl"), window_medians(points(run.records, "train/frac_reward_zero_std")[1])
    if kl is not None and rl.max_kl and kl > rl.max_kl / 2:
        yield Finding(
            "warning",
            f"the KL divergence from the first weights is {kl:.3g} per token",
            f"the run ends at rl.max_kl={rl.max_kl:g}; half of it is near",
            f"raise rl.kl_coefficient ({rl.kl_coefficient:g}), and read the answers in {run.path / 'answers'}",
        )
    if equal and equal[-1] > EQUAL_REWARDS:
        yield Finding(
            "bad",
            f"{equal[-1]:.0%} of the prompts have answers of equal reward",
            f"without differences there is no gradient; more than {EQUAL_REWARDS:.0%}",
            f"use prompts of another difficulty, or raise rl.answers_per_prompt ({rl.answers_per_prompt})",
        )
    trained = points(run.records, "train/reward")[1]
    rewards = window_medians(trained)
    if rewards and rewards[-1] < rewards[0] - noise(trained):
        yield Finding(
            "warning",
            f"the reward fell from {rewards[0]:.3f} to {rewards[-1]:.3f}",
            "the median of the last eighth of the steps is below that of the first, by more than chance",
            f"lower optimizer.learning_rate ({run.config.optimizer.learning_rate:g})",
        )
    failed = points(run.records, "train/failed_rewards")[1]
    if any(failed):
        per_step = run.config.data.batch_size * rl.answers_per_prompt * len(rl.rewards)
        share = statistics.fmean(failed) / per_step
        left_out = "an answer whose reward failed is not learned from, and no part of the mean reward"
        yield Finding(
            "bad" if share > FAILED_REWARDS else "warning",
            f"{share:.1%} of the rewards failed",
            f"{'they count as 0' if rl.failed_reward == 'zero' else left_out}; more than {FAILED_REWARDS:.0%} are bad",
            "return a low reward for a bad answer, instead of an exception; t5like rl --audit tests the rewards",
        )


def _lower_rate(run: Run, by: float) -> str:
    """A remedy: a learning rate that is so many times lower."""
    rate = run.config.optimizer.learning_rate
    return f"lower optimizer.learning_rate ({rate:g}; try {rate / by:.2g})"


# ---- Values ----


def last_update_ratios(run: Run) -> dict[str, float]:
    """The last update/parameter ratio of each layer, from the statistics of `train.stats_every`; empty without them."""
    names = dict.fromkeys(name for record in run.records for name in record if is_update_ratio(name))
    last = {name: _last(run, name) for name in names}
    return {name: value for name, value in last.items() if value is not None and value < LARGEST_RATIO}


def is_update_ratio(name: str) -> bool:
    """Whether a metric is the update/parameter ratio of a parameter (`optim.layer_statistics`)."""
    return name.startswith("stats/") and name.endswith("/update_ratio")


def layer_of(name: str) -> str:
    """The parameter in the name of a ratio: ``stats/decoder/layer_1/update_ratio`` gives ``decoder/layer_1``."""
    return name.removeprefix("stats/").removesuffix("/update_ratio")


def _last(run: Run, name: str) -> float | None:
    """The last finite value of a metric."""
    values = (record.get(name) for record in reversed(run.records))
    return next((value for value in values if value is not None), None)


def _steps_with(run: Run, name: str) -> list[int]:
    return [int(record["step"]) for record in run.records if record.get(name)]


def _shown(steps: Sequence[int]) -> str:
    return shorten([f"{step:,}" for step in steps])
