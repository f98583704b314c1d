"""`t5like train --overfit=1`: train on the first batches again and again; what keeps the loss from its floor?

A model, an optimizer and data that fit together can learn a few batches by heart. Dropout is off, and the learning rate
is constant at `optimizer.learning_rate` after a short warm-up; all else is as in training, on the same mesh. The end is
one of four: the loss is at its floor (`lowest_loss`), it has stopped falling, it diverged, or `train.num_steps` is
reached. Then the parameters whose gradient was 0 are named, and layers whose units are all 0. Nothing is written.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from t5like import tree
from t5like.checkpoint.init_from import InitialWeights, load_initial_weights
from t5like.config.schema import Config
from t5like.data import pipeline
from t5like.data.pipeline import Batches
from t5like.data.store import preparation
from t5like.data.tokenizers.vocabulary import Vocabulary
from t5like.errors import ConfigError, Diverged, shorten
from t5like.inspect import leaks, replay
from t5like.inspect.lowest_loss import Floor, lowest_loss
from t5like.inspect.step_tensors import Step
from t5like.optim import layer_statistics, step, train_state
from t5like.sharding import auto, memory, placement
from t5like.sharding import mesh as meshes
from t5like.train.report import describe_devices
from t5like.types import Batch, TrainState, host_metrics

AT_FLOOR = 0.1  # nats above the floor, at which the loss has reached it: targets have 90 % of their best probability
WARMUP = 20  # steps of warm-up at most
PATIENCE = 100  # steps after which the loss must be lower by `LEAST` of its distance to the floor
LEAST = 0.02
MEASURED = (1, 2, 5, 10, 20, 50)  # steps with statistics of the layers, besides every 100th and the last
NEGLIGIBLE = 1e-7  # a gradient with a smaller RMS than this part of the largest one moves nothing in float32
TOO_LARGE = 0.5  # an update of this part of its parameter in one step
DEAD_UNITS = 0.9


class Seen(NamedTuple):
    """What the steps have shown.

    Attributes:
        losses: mean loss of each step, nats per target token.
        largest: the largest value of each statistic of `layer_statistics` at the measured steps.
        last: the last values.
        sizes: number of elements of each parameter, with the layer in its name.
    """

    losses: list[float]
    largest: dict[str, float]
    last: dict[str, float]
    sizes: dict[str, int]

    def measure(self, values: dict[str, float]) -> None:
        self.last.update(values)
        for name, value in values.items():
            self.largest[name] = max(self.largest.get(name, 0.0), value)


def overfit(config: Config, count: int, *, debug_nan: bool = False, show: Callable[[str], None] = print) -> None:
    """Train on the first `count` batches of a config, and print what came of it.

    Raises:
        ConfigError, DataError, CheckpointError: config, the data or the initial weights can't be used.
        Diverged: with `debug_nan`, a value was not finite; names it.
    """
    if config.data.label_objective == "regression":
        raise ConfigError("--overfit needs nats per target; data.objective=regression has none: leave it out")
    config = simplified(config)
    mesh = meshes.make_mesh(config)
    config = auto.resolve_auto(config, mesh)
    shape = pipeline.spec(config)
    abstract = train_state.abstract_state(config, shape, mesh)
    memory.check_training(config, shape, abstract, mesh)
    for line in describe_devices(config, abstract, mesh):
        show(line)
    prepared = preparation.prepare(config)
    source = Batches(config, Vocabulary.of(prepared.tokenizer), pipeline.open_split(config, prepared.stores, "train"))
    rows = [source.at(index) for index in range(count)]
    batches = [placement.to_global(each, mesh, config.data.batch_size) for each in rows]
    weights = InitialWeights({}, "", [], [])
    if config.init_from.checkpoint:
        weights = load_initial_weights(config, abstract, prepared.tokenizer)
    state = train_state.new_state(config, shape, abstract, weights.params, weights.base)
    floor = lowest_loss(rows, label_smoothing=config.train.label_smoothing, vocab_size=config.tokenizer.vocab_size)
    for line in [*plan(config, count, rows, floor), *leaks.check(Step(config, mesh, state, batches[0]), rows[0])]:
        show(line)
    for line in run(config, mesh, state, abstract, batches, floor, debug_nan=debug_nan, show=show):
        show(line)


def simplified(config: Config) -> Config:
    """The config without dropout, and with a constant learning rate after a short warm-up."""
    optimizer = config.optimizer
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dropout_rate=0.0),
        train=dataclasses.replace(config.train, spike_factor=0.0),
        optimizer=dataclasses.replace(
            optimizer, schedule="constant", warmup_steps=min(optimizer.warmup_steps, WARMUP), decay_steps=0
        ),
    )


def plan(config: Config, count: int, rows: Sequence[Batch], floor: Floor) -> list[str]:
    """Lines about what is going to happen."""
    targets = int(sum(np.count_nonzero(each.weights_BL) for each in rows))
    why = []
    if config.train.label_smoothing:
        why.append(f"train.label_smoothing={config.train.label_smoothing:g}")
    if floor.shared:
        why.append(f"{100 * floor.shared:.2g} % of the targets have a context that occurs with other targets too")
    optimizer, text = config.optimizer, f": {'; '.join(why)}" if why else ": every context has one target"
    return [
        f"overfit    {count} batch{'es' * (count > 1)}, {targets:,} targets, without dropout, {optimizer.name} at "
        f"{optimizer.learning_rate:g} after {optimizer.warmup_steps} steps of warm-up",
        f"floor      {floor.nats:.3f} nats per target{text}; reached below {floor.nats + AT_FLOOR:.3f}",
    ]


def run(
    config: Config,
    mesh: jax.sharding.Mesh,
    state: TrainState,
    abstract: TrainState,
    batches: Sequence[Batch],
    floor: Floor,
    *,
    debug_nan: bool,
    show: Callable[[str], None],
) -> list[str]:
    """Train until one of the ends; returns what came of it."""
    shape = pipeline.spec(config)
    train_step = step.compile_train_step(config, shape, abstract)
    statistics = layer_statistics.compile_statistics(config, shape, abstract)
    seen = Seen([], {}, {}, parameter_sizes(state))
    why = f"train.num_steps={config.train.num_steps:,} is reached"
    for done in range(1, config.train.num_steps + 1):
        batch = batches[(done - 1) % len(batches)]
        if done in MEASURED or done % 100 == 0:
            seen.measure(layer_statistics.by_name(jax.device_get(statistics(state, batch))))
        state, metrics = train_step(state, batch)
        values = host_metrics(jax.device_get(metrics))
        seen.losses.append(values["loss"])
        if values["skipped_updates"]:
            if debug_nan:
                raise Diverged(replay.first_nonfinite_of(config, state, batch, done, show))
            why = f"at step {done:,} a value is not finite (--debug_nan names the first one)"
            break
        if done in MEASURED or done % 50 == 0:
            show(f"step {done:,}: loss {values['loss']:.3f}, gradient norm {values['grad_norm']:.3g}")
        if len(batches) <= done and np.mean(seen.losses[-len(batches) :]) <= floor.nats + AT_FLOOR:
            why = ""
            break
        if stalled(seen.losses, floor, len(batches)):
            why = f"in the last {max(PATIENCE, 4 * len(batches))} steps it fell by less than {100 * LEAST:.0f} %"
            break
    if math.isfinite(seen.losses[-1]):
        seen.measure(layer_statistics.by_name(jax.device_get(statistics(state, batches[0]))))
    return verdict(config, seen, floor, len(batches), why)


def parameter_sizes(state: TrainState) -> dict[str, int]:
    """The number of elements of each parameter, those of a stack layer by layer."""
    sizes = {}
    for name, leaf in tree.flatten(state.params).items():
        if layer_statistics.is_stacked(name):
            sizes |= {layer_statistics.of_layer(name, layer): leaf[0].size for layer in range(len(leaf))}
        else:
            sizes[name] = leaf.size
    return sizes


def stalled(losses: Sequence[float], floor: Floor, count: int) -> bool:
    """Whether the loss has stopped falling; compares means over whole passes of the batches."""
    patience = max(PATIENCE, 4 * count)
    if len(losses) < WARMUP + 2 * patience:
        return False
    window = max(patience // 4 // count * count, count)
    now, before = (np.mean(losses[stop - window : stop]) for stop in (len(losses), len(losses) - patience))
    return before - now < LEAST * max(before - floor.nats, AT_FLOOR)


# ---- What came of it ----


def verdict(config: Config, seen: Seen, floor: Floor, count: int, why: str) -> list[str]:
    """Lines for the user: the end, and what is wrong with parameters and layers."""
    loss, steps = float(np.mean(seen.losses[-count:])), len(seen.losses)
    if not why:
        lines = [f"result     the loss is at its floor after {steps:,} steps: {loss:.3f}, floor {floor.nats:.3f}"]
    else:
        lines = [f"result     the loss is NOT at its floor: {loss:.3f} instead of {floor.nats:.3f}; {why}"]
        lines += too_fast(config, seen)
    found = [*dead_parameters(config, seen), *dead_units(seen)]
    if why and len(lines) == 1 and not found:
        ratios = [value for name, value in seen.last.items() if name.endswith("update_ratio")]
        lines.append(
            f"           every parameter has a gradient, and the median update is {np.median(ratios):.1g} of its "
            "parameter; try another optimizer.learning_rate, more steps, or a larger model"
        )
    return [*lines, *found]


def too_fast(config: Config, seen: Seen) -> list[str]:
    """A line if the updates are too large: the loss rose, or a step replaces a parameter."""
    rate = config.optimizer.learning_rate
    ratios = {
        name.removesuffix("/update_ratio"): x for name, x in seen.largest.items() if name.endswith("update_ratio")
    }
    # A parameter that starts at 0, such as a bias, has no size to compare an update with.
    large = {name: x for name, x in ratios.items() if TOO_LARGE <= x < 1e6 and seen.sizes.get(name, 1) > 1}
    rose = not seen.losses[-1] < seen.losses[0]
    if len(large) * 2 < len(ratios) and not rose:
        return []
    worst = max(large, key=large.get, default=None)
    text = f"; one update of {worst} is {large[worst]:.2g} of it, 0.001 is usual" if worst else ""
    course = f"the loss went from {seen.losses[0]:.3f} to {seen.losses[-1]:.3f}"
    return [
        f"rate       optimizer.learning_rate={rate:g} is too high: {course}{text}; try {rate / 100:g} and {rate / 10:g}"
    ]


def dead_parameters(config: Config, seen: Seen) -> list[str]:
    """Lines that name parameters without a gradient."""
    root = lambda name: seen.largest[f"{name}/gradient_norm"] / math.sqrt(seen.sizes[name])
    stacked = lambda name: "/".join(part for part in name.split("/") if not part.isdecimal())
    trained = [name for name in seen.sizes if not tree.matches(stacked(name), config.optimizer.frozen)]
    gradients = {name: root(name) for name in trained}
    largest = max(gradients.values(), default=0.0)
    lines = []
    if zero := [name for name, value in gradients.items() if value == 0]:
        lines.append(f"dead       the gradient is exactly 0 at every step: {shorten(zero, shown=12)}")
    if small := [name for name, value in gradients.items() if 0 < value < NEGLIGIBLE * largest]:
        lines.append(
            f"dead       the gradient is less than {NEGLIGIBLE:g} of the largest one: {shorten(small, shown=12)}"
        )
    return lines


def dead_units(seen: Seen) -> list[str]:
    """Lines that name layers whose MLP is off."""
    suffix = "/mlp_hidden/dead"
    dead = {name.removesuffix(suffix): x for name, x in seen.last.items() if name.endswith(suffix) and x >= DEAD_UNITS}
    return [
        f"dead       {name}: {100 * x:.0f} % of the MLP's units are 0 at every position" for name, x in dead.items()
    ]
