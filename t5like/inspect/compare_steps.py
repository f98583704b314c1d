"""`t5like compare-steps`: one training step under two settings, compared tensor by tensor.

A side is a config, a run directory, or a file of tensors that `--output` wrote, also on another machine or from another
commit (`--python`). Both sides make the same step: the same rows and, from a config, the same random parameters. A side
runs on one device, unless its flags set a mesh. `tensor_differences` has the rule of what counts as a difference.
Nothing is written but the file of `--output`.
"""

import dataclasses
import json
import os
import subprocess
import tempfile
import tokenize
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from t5like.checkpoint.init_from import load_initial_weights
from t5like.checkpoint.run_directory import checkpoints_of, config_of
from t5like.config import loader
from t5like.config.schema import Config, MeshConfig
from t5like.data import pipeline
from t5like.data.row_schedule import RowSchedule
from t5like.data.store import preparation
from t5like.errors import CheckpointError, ConfigError, one_line
from t5like.inspect import replay, tensor_differences
from t5like.inspect.step_tensors import Programs, Step
from t5like.inspect.tensor_differences import FACTOR, SAMPLES, Difference, Noise, factor_text
from t5like.io.atomic import replace_file
from t5like.optim import train_state
from t5like.sharding import auto, placement
from t5like.sharding import mesh as meshes

SHOWN = 8  # tensors after the first one that are listed
FORMAT = 1  # of a file of tensors
# Unit roundoff by dtype, and of a float32 matmul by platform: TF32 on a GPU, bfloat16 on a TPU (JAX's default).
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-9}
UNIT_OF_FLOAT32 = {"gpu": 2.0**-11, "tpu": 2.0**-9}

Overrides = Sequence[tuple[str, str]]


class Side(NamedTuple):
    """One side of a comparison, as the command line has it.

    Attributes:
        name: "A" or "B".
        path: a config, a run directory or a file of tensors.
        shared: config fields of both sides.
        own: config fields of this side, which win.
    """

    name: str
    path: str
    shared: Overrides = ()
    own: Overrides = ()

    @property
    def overrides(self) -> Overrides:
        return (*self.shared, *self.own)


class Tensors(NamedTuple):
    """What is compared of a side.

    Attributes:
        values: by name, in the order of the step.
        noise: their changes by rounding (`tensor_differences`).
        unit: unit roundoff u.
        text: what the side is.
        axes: of its mesh, more than one device each.
    """

    values: dict[str, np.ndarray]
    noise: dict[str, Noise]
    unit: float
    text: str
    axes: dict[str, int]


def compare(a: Side, b: Side, number: int | None, python: str | None, show: Callable[[str], None] = print) -> bool:
    """Print how the sides differ; returns whether they do. `number` is the step; `python` the interpreter of B.

    Raises:
        ConfigError, CheckpointError, DataError: a side can't be used.
    """
    prepared = {
        side.name: open_step(side, number) for side in (a, b) if not is_file(side) and not (side is b and python)
    }
    unit = max((unit_of(each) for each, _ in prepared.values()), default=0.0)
    if python:
        of_b = of_interpreter(python, b, number)
    else:
        of_b = read(b) if is_file(b) else tensors(*prepared["B"], unit, samples=0 if "A" in prepared else SAMPLES)
    unit = max(unit, of_b.unit)
    of_a = read(a) if is_file(a) else tensors(*prepared["A"], unit, samples=SAMPLES)
    show(f"A          {of_a.text}")
    show(f"B          {of_b.text}")
    found, within = tensor_differences.compare(
        of_a.values, of_b.values, tensor_differences.larger(of_a.noise, of_b.noise), max(of_a.unit, of_b.unit)
    )
    for line in report(found, within, {**of_a.axes, **of_b.axes}):
        show(line)
    return bool(found)


def report(found: Sequence[Difference], within: Mapping[str, float], axes: Mapping[str, int]) -> list[str]:
    """The lines about the differences in the order of the step."""
    lines = [
        f"rule       a tensor differs if A - B is more than {FACTOR:g} times its largest change in {SAMPLES} runs of A "
        "whose parameters are moved by one unit of the last place at random",
        f"tensors    {len(found) + len(within)} compared: rows, parameters, forward, loss, gradients, updates",
    ]
    if not found:
        name, part = max(within.items(), key=lambda item: item[1])
        text = f"no tensor differs beyond rounding; the largest error is {part:.2g} of its limit, {name}"
        return [*lines, f"equal      {text}"]
    first, *others = found
    lines.append(f"first difference: {sentence(first, axes)}")
    lines += [f"           {sentence(each, axes)}" for each in others[:SHOWN]]
    if rest := others[SHOWN:]:
        lines.append(f"           and {len(rest)} more, up to {rest[-1].name}; {len(within)} tensors are equal")
    return lines


def sentence(difference: Difference, axes: Mapping[str, int]) -> str:
    """A difference in words."""
    words = {"gradient": "gradient of ", "update": "update of ", "parameter": "new value of "}
    first, _, rest = difference.name.partition("/")
    name = words[first] + rest if first in words else difference.name
    if difference.note:
        return f"{name}{f' in {difference.where}' if difference.where else ''}: {difference.note}"
    text = f"{name}: relative error {difference.error:.2g} (limit {difference.limit:.1g})"
    if difference.where:
        text += f" in {difference.where}"
    return text if difference.factor is None else f"{text}; {factor_text(difference.factor, axes)}"


# ---- Sides ----


def is_file(side: Side) -> bool:
    return side.path.endswith(".npz")


def unit_of(prepared: Step) -> float:
    """The unit roundoff of the computation of a step."""
    dtype, platform = prepared.config.model.dtype, prepared.mesh.devices.flat[0].platform
    return UNIT_OF_FLOAT32.get(platform, UNIT[dtype]) if dtype == "float32" else UNIT[dtype]


def open_step(side: Side, number: int | None) -> tuple[Step, str]:
    """The step of a config or a run on the devices of its mesh, and what it is, in words."""
    path = Path(side.path).expanduser()
    if (path / "config.json").is_file():
        return _step_of_run(side, path.absolute(), number)
    if path.is_dir():
        raise CheckpointError(
            f"{side.name}={side.path} holds no run; use a config, a run directory or a file of tensors"
        )
    try:
        config = loader.load(side.path, [each for each in side.overrides if not each[0].startswith("mesh.")])
    except ConfigError as error:
        raise ConfigError(str(error).replace("--config=", f"{side.name}=")) from error
    if config.rl.method != "none":
        raise ConfigError(f"{side.name}={side.path} has rl.method={config.rl.method}; use the directory of a run of it")
    refuse_teacher(side, config)
    config, mesh = on_mesh(side, config)
    replay.check_number(config, number := number or 1)
    shape = pipeline.spec(config)
    abstract = train_state.abstract_state(config, shape, mesh)
    source, params, base = "random parameters", None, None
    if config.init_from.checkpoint:
        weights = load_initial_weights(config, abstract, preparation.prepare(config).tokenizer)
        source, params, base = weights.source, weights.params, weights.base
    state = train_state.new_state(config, shape, abstract, params, base)
    state = state._replace(step=jax.device_put(np.int32(number - 1), abstract.step.sharding))
    rows = replay.open_batches(config, RowSchedule.of(config.data.batch_size)).at(number - 1)
    batch = placement.to_global(rows, mesh, config.data.batch_size)
    return Step(config, mesh, state, batch), describe(side, f"step {number:,} from {source}", config, mesh)


def _step_of_run(side: Side, workdir: Path, number: int | None) -> tuple[Step, str]:
    """The step of a run, from the checkpoint before it, on the devices of the side."""
    saved = config_of(workdir)
    if number is None:
        number = (checkpoints_of(workdir, saved).latest() or 0) + 1
    else:
        replay.check_number(saved, number)
    refuse_teacher(side, saved)
    before = replay.prepare(workdir, number, lambda _: None)
    requested = replay.config_at(workdir, checkpoints_of(workdir, saved), number)
    config = loader.changed(requested, [each for each in side.overrides if not each[0].startswith("mesh.")])
    config, mesh = on_mesh(side, config)
    abstract = train_state.abstract_state(config, pipeline.spec(config), mesh)
    shapes = lambda state: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]
    if shapes(abstract) != shapes(before.state) or jax.tree.structure(abstract) != jax.tree.structure(before.state):
        fields = ", ".join(f"--{side.name.lower()}.config.{name}" for name, _ in side.overrides)
        raise ConfigError(f"{fields} changes the parameters or the optimizer state of {workdir}; compare two configs")
    state = jax.tree.map(lambda leaf, like: jax.device_put(np.asarray(leaf), like.sharding), before.state, abstract)
    rows = jax.device_get(before.batch)
    batch = jax.tree.map(jax.device_put, rows, placement.batch_shardings(rows, mesh))
    prepared = before._replace(config=config, mesh=mesh, state=state, batch=batch)
    return prepared, describe(side, f"step {number:,}", config, mesh)


def refuse_teacher(side: Side, config: Config) -> None:
    """Refuse a step with a teacher, whose parameters are not moved to the mesh of a side."""
    if config.distill.teacher:
        raise ConfigError(
            f"{side.name}={side.path} has distill.teacher={config.distill.teacher}, which compare-steps can't read; "
            "use a config without it"
        )


def on_mesh(side: Side, config: Config) -> tuple[Config, jax.sharding.Mesh]:
    """The config on the devices that the flags of a side ask for, without any on one device."""
    config = dataclasses.replace(config, mesh=MeshConfig(data=1))
    config = loader.changed(config, [each for each in side.overrides if each[0].startswith("mesh.")])
    sizes, devices = [getattr(config.mesh, axis) for axis in meshes.AXES], jax.devices()
    count = len(devices) if -1 in sizes else int(np.prod(sizes))
    if count > len(devices):
        has = f"there are {len(devices)}" if len(devices) > 1 else "there is one"
        raise ConfigError(f"{side.name} needs {count} devices, and {has}; use --fake_devices={count}")
    mesh = meshes.make_mesh(config, devices[:count])
    return auto.resolve_auto(config, mesh), mesh


def describe(side: Side, what: str, config: Config, mesh: jax.sharding.Mesh) -> str:
    """What a side is, in words."""
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    devices = f"{mesh.size} {mesh.devices.flat[0].device_kind}" + (f" ({axes})" if axes else "")
    fields = "".join(f", {name}={value}" for name, value in side.own if not name.startswith("mesh."))
    return f"{side.path}: {what}, {config.model.dtype}, on {devices}{fields}"


def tensors(prepared: Step, text: str, unit: float, *, samples: int = SAMPLES) -> Tensors:
    """The tensors of a step; `unit` is the unit roundoff that its noise is measured with, in `samples` runs."""
    programs = Programs(prepared)
    values, noise = programs.run(), {}
    for seed in range(samples):
        moved = programs.run(programs.moved(2 * unit, seed))
        noise = tensor_differences.larger(
            noise, {name: tensor_differences.change(x, moved[name]) for name, x in values.items()}
        )
    axes = {axis: size for axis, size in prepared.mesh.shape.items() if size > 1}
    return Tensors(values, noise, unit, text, axes)


# ---- Files ----


def write(side: Side, number: int | None, path: Path) -> str:
    """Write the tensors of a side to a file, for a comparison elsewhere; returns what the side is."""
    prepared, text = open_step(side, number)
    of_side = tensors(prepared, text, unit_of(prepared))
    facts = {"format": FORMAT, "unit": of_side.unit, "text": text, "axes": of_side.axes, "noise": of_side.noise}
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "tensors.npz"
        np.savez(file, **{"": np.array(json.dumps(facts))}, **of_side.values)
        replace_file(path, file.read_bytes(), CheckpointError, "use another --output")
    return text


def read(side: Side) -> Tensors:
    """The tensors of a file that `write` wrote.

    Raises:
        CheckpointError: it can't be read, or is another file.
    """
    try:
        with np.load(Path(side.path).expanduser(), allow_pickle=False) as file:
            facts = json.loads(str(file[""]))
            assert facts["format"] == FORMAT
            noise = {name: Noise(*values) for name, values in facts["noise"].items()}
            values = {name: file[name] for name in file.files if name}
            return Tensors(values, noise, facts["unit"], facts["text"], facts["axes"])
    except (OSError, ValueError, KeyError, AssertionError, TypeError, tokenize.TokenError) as error:
        reason = one_line(error) or "another format"
        raise CheckpointError(f"{side.name}={side.path} is no file of compare-steps --output: {reason}") from None


def of_interpreter(python: str, side: Side, number: int | None) -> Tensors:
    """The tensors of a side as the t5like of another Python environment computes them.

    Raises:
        ConfigError: that t5like has no compare-steps, or it fails.
    """
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "tensors.npz"
        flags = [f"--config.{name}={value}" for name, value in side.overrides]
        flags += [f"--step={number}"] if number else []
        # -P: a package in the current directory must not take the place of the installed one.
        command = [python, "-P", "-m", "t5like", "compare-steps", side.path, f"--output={file}", *flags]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        try:
            done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=False)
        except OSError as error:
            raise ConfigError(f"--python={python} can't be started: {error.strerror}; use ENV/bin/python") from None
        if done.returncode:
            reason = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise ConfigError(f"--python={python}: its compare-steps ended with {done.returncode}: {reason}")
        return read(Side(side.name, str(file)))
