"""Run one step of a run again, on one device, and name the first layer and operation whose result is not finite.

`t5like replay` reads the newest checkpoint before update N, or makes the random state of a run that has none, repeats
the updates up to N - 1 with the trainer's own step, and examines update N: its metrics, statistics of each layer, and
where the first NaN or infinity comes from. The rows are those of the run: if it kept evidence of a bad step N
(`train.evidence`), those of that step, otherwise those of its schedule. In a run of `t5like rl` the answers are sampled
and scored again. Nothing is written.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5like import tree
from t5like.checkpoint.checkpoints import Checkpoints
from t5like.checkpoint.run_directory import checkpoints_of, config_of, on_devices
from t5like.checkpoint.teacher import open_teacher, read_params
from t5like.config.schema import Config
from t5like.data import pipeline
from t5like.data.pipeline import Batches
from t5like.data.row_schedule import RowSchedule, Segment
from t5like.data.store import preparation
from t5like.data.tokenizers.vocabulary import Vocabulary
from t5like.errors import CheckpointError, ConfigError
from t5like.inspect import first_nonfinite
from t5like.inspect.step_tensors import Step
from t5like.model.layer_values import compute_intermediates
from t5like.optim import distillation, step, train_state
from t5like.optim.layer_statistics import norms_by_layer
from t5like.optim.optimizers import make_optimizer
from t5like.optim.programs import ProgramsByShape
from t5like.rl.run import opened as open_rl
from t5like.sharding import auto, placement
from t5like.sharding import mesh as meshes
from t5like.train.evidence import read_record
from t5like.train.initial_state import restore_state
from t5like.types import Batch, Taught, TrainState, host_metrics


def replay(workdir: Path, number: int, show: Callable[[str], None] = print) -> None:
    """Run update `number` of a run again, and print what is wrong with it.

    Raises:
        ConfigError: the run has fewer steps.
        CheckpointError: there is no checkpoint before it, or none that can be read.
    """
    check_number(config_of(workdir), number)
    prepared = prepare(workdir, number, show)
    with jax.set_mesh(prepared.mesh):
        for line in examine(prepared):
            show(line)


def check_number(config: Config, number: int) -> None:
    """Refuse an update that the run of a config does not make.

    Raises:
        ConfigError: `number` is more than its steps.
    """
    if number > (last := config.train.num_steps):
        raise ConfigError(f"--step={number} must be at most {last}: train.num_steps={last}; use --step={last}")


def prepare(workdir: Path, number: int, show: Callable[[str], None] = print) -> Step:
    """Update `number` of a run, on one device."""
    checkpoints = checkpoints_of(workdir, config_of(workdir))
    start = start_before(checkpoints, number)
    config = config_at(workdir, checkpoints, number)
    mesh = meshes.make_mesh(config, jax.devices()[:1])
    config = auto.resolve_auto(config, mesh)
    schedule = rows_of(workdir, checkpoints, start, number)
    first = schedule.first_row(number - 1)
    shape = pipeline.spec(config)
    abstract = train_state.abstract_state(config, shape, mesh)
    show(
        f"replay     step {number:,}, from {f'checkpoint {start:,}' if start else 'random parameters'}, rows {first:,} "
        f"to {first + config.data.batch_size - 1:,}, on one {mesh.devices.flat[0].device_kind}"
    )
    state = restore_state(checkpoints, abstract, start) if start else train_state.new_state(config, shape, abstract)
    with opened(config, workdir, mesh, state, schedule) as steps:
        train_step = None
        if number - 1 > start:
            compiled_for = lambda batch: step.compile_train_step(
                config, batch, abstract, steps.loss_fn, steps.model_batch
            )
            train_step = ProgramsByShape(compiled_for, steps.spec)
        for index in range(start, number - 1):
            state, metrics = train_step(state, steps.batch(state, index))
            values = host_metrics(jax.device_get(metrics))
            show(f"step {index + 1:,}: loss {values['loss']:.4f}, gradient norm {values['grad_norm']:.4g}")
        return Step(config, mesh, state, steps.batch(state, number - 1), steps.loss_fn, steps.model_batch)


class Steps(NamedTuple):
    """What a run trains on.

    Attributes:
        batch: (state, number of completed updates) -> the arrays of the next step.
        spec: their shapes.
        loss_fn, model_batch: see `optim.step`.
    """

    batch: Callable[[TrainState, int], Any]
    spec: Any
    loss_fn: step.LossFn
    model_batch: step.ModelBatch


@contextlib.contextmanager
def opened(
    config: Config, workdir: Path, mesh: jax.sharding.Mesh, state: TrainState, schedule: RowSchedule
) -> Iterator[Steps]:
    """The steps of a run, whose rewards need processes of their own; `state` is that of the first of them."""
    if config.rl.method == "none":
        batches = open_batches(config, schedule)
        place = lambda _, index: placement.to_global(batches.at(index), mesh, config.data.batch_size)
        if not config.distill.teacher:
            yield Steps(place, pipeline.spec(config), step.pretrain_loss, step.unchanged)
            return
        teacher = open_teacher(config, mesh)
        params, loss_fn = read_params(config, teacher), distillation.distilled_loss(teacher.config)
        spec = Taught(pipeline.spec(config), teacher.abstract)
        yield Steps(lambda _, index: Taught(place(_, index), params), spec, loss_fn, distillation.rows_of)
        return
    tokenizer = dataclasses.replace(config.tokenizer, path=str(workdir / "tokenizer.model"))
    rl = dataclasses.replace(config.rl, table_every=0, max_kl=0.0)  # nothing is written; no step ends the run
    config = dataclasses.replace(config, tokenizer=tokenizer, rl=rl)
    with open_rl(config) as open_task:
        task = open_task(config, mesh, workdir, lambda _: None)
        task.batches.follow(schedule)
        task.start(state)
        batch = lambda state, index: task.device_batch(state, index, task.batches.at(index))[0]
        yield Steps(batch, task.spec, task.loss_fn, task.model_batch)


def start_before(checkpoints: Checkpoints, number: int) -> int:
    """The newest checkpoint before update `number`; 0: the random parameters that a run began with.

    Raises:
        CheckpointError: there is none before it, and the run began with other weights.
    """
    steps = checkpoints.steps()
    config = checkpoints.meta().config if steps else config_of(checkpoints.directory.parent)
    before = [saved for saved in steps if 0 < saved < number]
    if before:
        return before[-1]
    if config.init_from.checkpoint or 0 in steps:
        later = [saved for saved in steps if saved]
        use = f"use --step={later[0] + 1} or a later one" if later else "train it until one is saved"
        raise CheckpointError(f"{checkpoints.directory} holds no checkpoint before step {number}; {use}")
    return 0


def config_at(workdir: Path, checkpoints: Checkpoints, number: int) -> Config:
    """The config with which the run made update `number`, for one device: fields may have changed at a checkpoint."""
    steps, saved = checkpoints.steps(), config_of(workdir)
    later = [step for step in steps if step >= number]
    config = checkpoints.meta(later[0]).config if later else saved
    if steps and not later:
        dtype = checkpoints.meta().config.model.dtype  # a checkpoint contains the resolved one
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    microbatches = config.train.microbatches  # dropout depends on them
    config = on_devices(config, 1)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, microbatches=microbatches))


def rows_of(workdir: Path, checkpoints: Checkpoints, start: int, number: int) -> RowSchedule:
    """The rows of the steps from a checkpoint up to update `number`.

    A run that went back to that checkpoint passed over the rows of a bad step: its evidence has them.
    """
    record = read_record(workdir, number)
    if record and (record["checkpoint"] or 0) == start:
        size = record["batch_size"]
        first = Segment(start, record["first_row"] - (number - 1 - start) * size, size)
        return RowSchedule((Segment(0, 0, size), first) if start else (first,))
    if steps := checkpoints.steps():
        return checkpoints.meta(steps[-1]).history.rows
    return RowSchedule.of(config_of(workdir).data.batch_size)


def open_batches(config: Config, schedule: RowSchedule) -> Batches:
    """The training batches of a config; the token store is prepared if it is missing."""
    prepared = preparation.prepare(config)
    split = pipeline.open_split(config, prepared.stores, "train")
    batches = Batches(config, Vocabulary.of(prepared.tokenizer), split)
    batches.follow(schedule)
    return batches


# ---- What is wrong with a step ----


def first_nonfinite_of(
    config: Config, state: TrainState, batch: Batch, number: int, show: Callable[[str], None] = print
) -> str:
    """Examine update `number`, which was skipped: print its layers, and return its first value that is not finite.

    `state` is the one after the step. It has the parameters and moments from before it, as no update was made. For runs
    of one process.
    """
    mesh = meshes.make_mesh(single := on_devices(config, 1), jax.devices()[:1])
    single = dataclasses.replace(single, train=config.train)  # dropout depends on the microbatches
    place = lambda leaf: jax.device_put(np.asarray(leaf), mesh.devices.flat[0])
    state, batch = jax.tree.map(place, (state._replace(step=state.step - 1), batch))
    with jax.set_mesh(mesh):
        *lines, last = examine(Step(single, mesh, state, batch))
    for line in lines:
        show(line)
    return f"step {number:,}: {last.removeprefix('first').strip()}"


def examine(prepared: Step) -> list[str]:
    """Lines for the user: metrics of the step, statistics of each layer, the first value that is not finite."""
    config, state, batch = prepared.config, prepared.state, prepared.batch
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, layers="unroll", remat="none"))
    gradient = step.make_gradient(config, prepared.loss_fn)
    grads, metrics = jax.jit(gradient)(state.params, batch, state.step, state.base)
    norms = jax.device_get(norms_by_layer(grads))
    loss, norm = metrics["loss"].total / metrics["loss"].weight, math.sqrt(sum(np.sum(x**2) for x in norms.values()))
    lines = [f"step {int(state.step) + 1:,}: loss {float(loss):.4f}, gradient norm {norm:.4g}"]
    rows = prepared.model_batch(batch)
    lines += layer_table(config, train_state.model_params(state), rows, norms)
    return [*lines, f"first      {first_wrong(config, state, batch, rows, gradient, grads)}"]


def first_wrong(config: Config, state: TrainState, batch: Any, rows: Batch, gradient, grads) -> str:
    """The first value of a step that is not finite, as text; `rows` are those of the batch that the model reads."""
    names = ("params", "opt_state", "ema")
    for name, leaf in tree.flatten({name: getattr(state, name) for name in names}).items():
        if value := first_nonfinite.nonfinite(leaf):
            return f"before the step: {where(name, leaf)} is {value}"
    if any(first_nonfinite.nonfinite(leaf) for leaf in jax.tree.leaves(grads)):
        arguments = (state.params, batch, state.step, state.base)
        origin = first_nonfinite.find(lambda *each: gradient(*each)[1]["loss"].total, *arguments)
        origin = origin or first_nonfinite.find(gradient, *arguments)  # only the backward pass is bad
        if origin is None:
            return "not found: the gradient is finite if its operations are evaluated one after another"
        if origin.operation == "argument":
            return f"the batch: {origin.scope} is {origin.value}"
        backward = " in the backward pass" if origin.backward else ""
        return f"{origin.scope}: {origin.operation} gives {origin.value} from finite inputs{backward} ({origin.source})"
    axes = train_state.parameter_axes(config, rows)
    updates, _ = jax.jit(make_optimizer(config, state.params, axes).update)(grads, state.opt_state, state.params)
    for name, leaf in tree.flatten(updates).items():
        if value := first_nonfinite.nonfinite(leaf):
            return f"the update of {where(name, leaf)} is {value}, although the gradient and its moments are finite"
    return "none: loss, gradient and update are finite"


def where(name: str, leaf: jax.Array) -> str:
    """A leaf's name, and the first of its layers that is not finite if it stacks layers."""
    if "layers" not in name.split("/"):
        return name
    dims = tuple(range(1, leaf.ndim))
    layer = int(jnp.argmin(jnp.isfinite(leaf).all(dims)))
    return f"{name}, layer {layer}"


def layer_table(config: Config, params, batch: Batch, norms: dict[str, Any]) -> list[str]:
    """A line for each layer: largest absolute values inside of it, without dropout, and its gradient norm."""
    names = ("residual", "attention_weights", "mlp_input")

    @jax.jit
    def largest(params, batch):
        values = compute_intermediates(config, params, batch, names)
        return {name: jnp.abs(x.astype(jnp.float32)).max(range(1, x.ndim)) for name, x in values.items()}

    maxima = jax.device_get(largest(params, batch))
    lines = [f"{'layer':24}" + "".join(f"{'max ' + name:>24}" for name in names) + f"{'gradient norm':>16}"]
    for stack in dict.fromkeys(name.partition("/")[0] for name in maxima):
        for layer in range(len(maxima[f"{stack}/residual"])):
            own = [norm[layer] for name, norm in norms.items() if name.startswith(f"{stack}/layers/")]
            columns = "".join(f"{maxima[f'{stack}/{name}'][layer]:>24.4g}" for name in names)
            lines.append(f"{f'{stack}/layer_{layer}':24}{columns}{math.sqrt(sum(float(x) ** 2 for x in own)):>16.4g}")
    for name, norm in norms.items():
        if np.ndim(norm) == 0:
            lines.append(f"{name:24}{'':>{24 * len(names)}}{norm:>16.4g}")
    return lines
