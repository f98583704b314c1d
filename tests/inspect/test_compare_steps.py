"""One step under two settings: equal up to rounding where it must be, and each injected fault is named."""

import sys

import jax
import numpy as np
import pytest
from conftest import begun, random_batch, small
from one_device import XLA_FLAGS

from t5like.inspect import compare_steps, step_tensors, tensor_differences
from t5like.inspect.step_tensors import Step
from t5like.model import mlp
from t5like.model.kernels import plain
from t5like.optim import train_state
from t5like.sharding import auto, placement
from t5like.sharding import mesh as meshes


def a_step(**sections) -> Step:
    """A step of a decoder of one layer, on as many devices as its mesh has."""
    config = small(
        model={"architecture": "decoder", "num_layers": 1, "kernels": "plain", "dtype": "float32"}
        | sections.get("model", {}),
        mesh={"data": 1} | sections.get("mesh", {}),
    )
    mesh = meshes.make_mesh(config, jax.devices()[: config.mesh.data * config.mesh.tensor])
    config, rows = auto.resolve_auto(config, mesh), random_batch(config)
    state = begun(config, rows, train_state.abstract_state(config, rows, mesh))
    return Step(config, mesh, state, placement.to_global(rows, mesh, config.data.batch_size))


def tensors(prepared: Step, samples: int = 0) -> compare_steps.Tensors:
    return compare_steps.tensors(prepared, "", compare_steps.unit_of(prepared), samples=samples)


def differences(a: compare_steps.Tensors, b: compare_steps.Tensors) -> list[str]:
    found, _ = tensor_differences.compare(a.values, b.values, a.noise, max(a.unit, b.unit))
    return [compare_steps.sentence(each, {**a.axes, **b.axes}) for each in found]


@pytest.fixture(scope="module")
def reference():
    return tensors(a_step(), samples=3)


def test_a_tensor_axis_changes_nothing_beyond_rounding(reference):
    split = tensors(a_step(mesh={"tensor": 2}))
    assert differences(reference, split) == []
    assert split.axes == {"tensor": 2} and any(
        not np.array_equal(x, split.values[name]) for name, x in reference.values.items()
    )


def test_a_gradient_without_its_sum_over_a_mesh_axis_is_named_with_the_factor(reference, monkeypatch):
    @jax.custom_vjp
    def halved(x):
        return x

    halved.defvjp(lambda x: (x, None), lambda _, gradient: (gradient / 2,))  # the mean of two devices, not their sum
    monkeypatch.setattr(mlp, "constrain", lambda x, *axes: halved(x))
    first, *_ = differences(reference, tensors(a_step(mesh={"tensor": 2})))
    assert first.startswith("gradient of decoder/layers/0/mlp/gate/kernel: relative error ")
    assert first.endswith("; B has 0.5 x A, the size of mesh.tensor=2: a sum over that axis is missing or made twice")


def test_an_attention_kernel_that_is_wrong_in_bfloat16_is_named(monkeypatch):
    def forward(prepared):
        return step_tensors.Programs(prepared, backward=False)

    prepared = a_step(model={"dtype": "bfloat16"})
    unit, programs = compare_steps.unit_of(prepared), forward(prepared)
    right = programs.run()
    noise = {
        name: tensor_differences.change(right[name], x) for name, x in programs.run(programs.moved(2 * unit, 0)).items()
    }
    float32 = forward(a_step()).run()
    assert tensor_differences.compare(float32, right, noise, unit)[0] == []  # the dtype alone is rounding

    correct = plain.attend
    lossy = lambda q, k, v, *rest: correct(q, k, v.at[:, :, ::8].set(0) if v.dtype == "bfloat16" else v, *rest)
    monkeypatch.setattr(plain, "attend", lossy)
    found, _ = tensor_differences.compare(right, forward(prepared).run(), noise, unit)
    assert found[0].name == "decoder/layers/0/attention_output" and found[0].error > 3 * found[0].limit


def test_rows_that_differ_come_first(reference):
    values = reference.values | {"batch/targets_BL": reference.values["batch/targets_BL"] + 1}
    [first] = differences(reference, reference._replace(values=values))
    assert first.startswith("batch/targets_BL: relative error ")


def test_a_run_is_compared_with_another_interpreter_through_a_file(
    command, refused, trained_decoder, tmp_path, monkeypatch
):
    monkeypatch.setenv("XLA_FLAGS", XLA_FLAGS)  # the run had one device, too
    code, out, err = command("compare-steps", trained_decoder, "--step=2", f"--python={sys.executable}")
    assert code == 0, err
    *_, tensors, last = out.splitlines()
    assert last.startswith("equal      no tensor differs beyond rounding") and "compared: rows, parameters" in tensors
    code, message = refused("compare-steps", trained_decoder, "--step=2", "--b.config.model.num_layers=2")
    assert code == 2 and message.startswith("--b.config.model.num_layers changes the parameters or the optimizer state")
    (tmp_path / "a.npz").write_bytes(b"no tensors")
    code, message = refused("compare-steps", tmp_path / "a.npz")
    assert code == 4 and "a.npz is no file of compare-steps --output: " in message
    code, message = refused("train", f"--workdir={trained_decoder}", "--a.config.seed=1")
    assert code == 2 and message == "--a.config.seed is for compare-steps; use --config.seed"
