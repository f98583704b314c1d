"""One update: on any mesh, in any number of parts, traced once, planned as it is run."""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import begun, random_batch
from model_variants import drawn_params

from t5like import tree
from t5like.errors import ConfigError
from t5like.optim import eval_step, step, train_state
from t5like.optim.optimizers import make_optimizer
from t5like.sharding import auto, placement
from t5like.sharding import mesh as meshes
from t5like.types import Batch, TrainState


def small(**sections):
    """`conftest.small` with one layer: what is tested here does not depend on how many there are, compile time does."""
    return conftest.small(**{**sections, "model": {"num_layers": 1, **sections.get("model", {})}})


SHAPES = {
    "encoder_decoder": {"data": {"cross_document_attention": False, "source": ("a", "b", "c", "d")}},
    "decoder": {"model": {"architecture": "decoder", "positions": "rotary", "num_kv_heads": 4}},
    "prefix": {
        "model": {"architecture": "decoder", "num_kv_heads": 2},
        "data": {"objective": "prefix_lm", "cross_document_attention": False},
    },
    # Attention's key bias changes no output: its gradient is rounding, which Adam must not blow up.
    "encoder": {
        "model": {
            "architecture": "encoder",
            "positions": "learned",
            "norm": "layer",
            "norm_position": "post",
            "embedding_norm": True,
            "token_types": 2,
            "head": "mlm",
            "mlp": "gelu_exact",
            "biases": True,
            "tied_embeddings": True,
            "init": "bert",
        },
        "data": {"objective": "mlm_nsp"},
        "optimizer": {"epsilon": 1e-5},
    },
}


def begun_alone(shape):
    """The first state of a shape on one device."""
    config = small(**SHAPES[shape])
    config = auto.resolve_auto(config, mesh := meshes.make_mesh(config, jax.devices()[:1]))
    batch = random_batch(config)
    return begun(config, batch, train_state.abstract_state(config, batch, mesh))


def batch_of(config, seed=0):
    """A batch; of four sources, rows of three of them with unequal targets, one row without."""
    batch = random_batch(config, seed)
    if len(config.data.source) != 4:
        return batch
    lengths = np.array([1, 44, 0, 9, 3, 30, 2, 7])[:, None]
    weights = batch.weights_BL * (np.arange(batch.weights_BL.shape[1]) < lengths)
    component = np.array([[0], [1], [1], [3], [1], [0], [3], [1]], np.int32)
    return batch._replace(weights_BL=weights.astype(np.float32), component_B1=component)


@functools.cache
def program_of(config, devices):
    """The resolved config, the mesh, the abstract state and the jitted step, once for all batches."""
    mesh = meshes.make_mesh(config, jax.devices()[:devices])
    config = auto.resolve_auto(config, mesh)
    abstract = train_state.abstract_state(config, random_batch(config), mesh)
    return config, mesh, abstract, step.jit_train_step(config, abstract)


def one_step(config, batch, devices):
    """State and metrics after two steps on a mesh of that many devices."""
    config, mesh, abstract, update = program_of(config, devices)
    state = begun(config, batch, abstract)
    with jax.set_mesh(mesh):
        for _ in range(2):
            state, metrics = update(state, placement.to_global(batch, mesh, config.data.batch_size))
    return state, metrics


@functools.cache
def on_one_device(shape):
    config = small(**SHAPES[shape])
    return jax.device_get(one_step(config, batch_of(config), 1))


@functools.cache
def in_parts():
    """The encoder-decoder in chunks and microbatches of a batch that is sharded over four devices."""
    config = small(**SHAPES["encoder_decoder"], train={"microbatches": 2, "loss_chunk": 5})
    return jax.device_get(one_step(config, batch_of(config), 4))


def assert_same(ours, reference):
    """Equal to float32 tolerance: metrics, and every parameter relative to the size of its update."""
    assert set(ours[1]) == set(reference[1])
    for name in ours[1]:
        np.testing.assert_allclose(ours[1][name].total, reference[1][name].total, rtol=2e-5, atol=1e-6, err_msg=name)
    # AdamW's first steps move every parameter by about the learning rate, whatever its gradient: where that is nearly
    # 0, rounding decides the direction. So nearly all must agree closely, and none may differ by more than the steps.
    for name, leaf in tree.flatten(ours[0].params).items():
        error = np.abs(np.asarray(leaf) - tree.flatten(reference[0].params)[name])
        assert np.quantile(error, 0.99) < 2e-5 and error.max() < 4.1e-3, name


@pytest.mark.parametrize(
    "shape, mesh",
    [
        ("encoder_decoder", {"data": 1, "fsdp": 2, "tensor": 2, "context": 2}),
        ("encoder_decoder", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("decoder", {"data": 1, "tensor": 4, "context": 2}),
        ("prefix", {"context": 4}),
        ("encoder", {"data": 1, "fsdp": 2, "tensor": 2, "context": 2}),
    ],
)
def test_any_mesh_equals_one_device(shape, mesh):
    config = small(**SHAPES[shape], mesh=mesh)
    assert_same(jax.device_get(one_step(config, batch_of(config), 8)), on_one_device(shape))


def test_a_new_state_is_sharded_and_has_the_values_of_one_device():
    config = small(mesh={"data": 1, "fsdp": 4, "tensor": 2})
    batch = random_batch(config)
    state = train_state.new_state(config, batch, train_state.abstract_state(config, batch, meshes.make_mesh(config)))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), begun_alone("encoder_decoder"))
    whole = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    here = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state.params))
    assert here < whole / 7  # norms and the like stay whole
    for name, leaf in tree.flatten(state.opt_state).items():
        owner = next((p for p in tree.flatten(state.params) if name.endswith(p)), None)
        if owner and leaf.ndim:
            assert leaf.sharding == tree.flatten(state.params)[owner].sharding, name


def test_microbatches_of_pairs_equal_the_whole_batch_with_unequal_targets():
    config = small(**SHAPES["encoder"])
    batch = random_batch(config)
    weights = batch.weights_BL * (np.arange(batch.weights_BL.shape[1]) < np.array([1, 44, 3, 9, 0, 30, 2, 7])[:, None])
    batch = batch._replace(weights_BL=weights.astype(np.float32))
    whole = jax.device_get(one_step(config, batch, 1))
    parts = small(**SHAPES["encoder"], train={"microbatches": 4})
    assert_same(jax.device_get(one_step(parts, batch, 1)), whole)


def test_chunks_and_microbatches_of_a_sharded_batch_equal_the_whole_batch_with_unequal_targets():
    assert_same(in_parts(), on_one_device("encoder_decoder"))


class Learner(NamedTuple):
    """A step on one device with a moving average, which several tests run, each from the first state."""

    batch: Batch
    abstract: TrainState
    update: Callable
    traces: list[int]

    def begin(self) -> TrainState:
        return begun(LEARNER, self.batch, self.abstract)


LEARNER = small(optimizer={"ema_decay": 0.9, "learning_rate": 1e-2})


@pytest.fixture(scope="module")
def learner() -> Learner:
    mesh, batch, traces = meshes.make_mesh(LEARNER, jax.devices()[:1]), random_batch(LEARNER), []

    def counting(*args):
        traces.append(1)
        return step.pretrain_loss(*args)

    abstract = train_state.abstract_state(LEARNER, batch, mesh)
    update = step.jit_train_step(LEARNER, abstract, counting)

    def on_mesh(state, batch):
        with jax.set_mesh(mesh):
            return update(state, placement.to_global(batch, mesh, 8))

    return Learner(batch, abstract, on_mesh, traces)


def test_the_step_is_traced_once(learner):
    state = learner.begin()
    for seed in range(3):
        state, _ = learner.update(state, random_batch(LEARNER, seed))
    assert len(learner.traces) == 1 and int(state.step) == 3  # also by the tests before


def test_the_state_is_donated(learner):
    memory = step.lower_train_step(LEARNER, learner.batch, learner.abstract).compile().memory_analysis()
    bytes_of_state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(learner.abstract))
    assert memory.alias_size_in_bytes >= bytes_of_state


def test_pairs_count_as_much_as_the_masked_tokens_of_a_full_row():
    config = small(**SHAPES["encoder"], train={"z_loss": 0.0})
    batch = random_batch(config)
    params = begun_alone("encoder").params
    loss_of = jax.jit(lambda batch: step.pretrain_loss(config, params, batch, None))
    loss = loss_of(batch)
    tokens, pairs = loss.metrics["loss"], loss.metrics["nsp_loss"]
    assert pairs.weight == 8 and float(pairs.total) / 8 == pytest.approx(np.log(2), abs=0.1)
    assert float(loss.objective) == pytest.approx(float(tokens.total + 5 * pairs.total), rel=1e-6)  # 15 % of 32 tokens
    alone = loss_of(batch._replace(follows_B1=None))
    assert float(alone.objective) == pytest.approx(float(tokens.total), rel=1e-6) and "nsp_loss" not in alone.metrics


def test_an_encoder_counts_the_tokens_it_reads():
    batch = random_batch(small(**SHAPES["encoder"]))
    _, metrics = on_one_device("encoder")
    assert metrics["tokens"].total == (batch.encoder_BS != 0).sum() < batch.encoder_BS.size


def test_losses_by_component_add_up_also_in_chunks_microbatches_and_on_a_mesh():
    batch, whole = batch_of(small(**SHAPES["encoder_decoder"])), on_one_device("encoder_decoder")[1]
    component = batch.component_B1[:, 0]
    for metrics in (whole, in_parts()[1]):
        np.testing.assert_array_equal(metrics["rows_by_component"].total, [2, 3, 0, 2])
        of_components = np.bincount(component, batch.weights_BL.sum(1), 4)
        np.testing.assert_array_equal(metrics["by_component"].weight, of_components)
        np.testing.assert_allclose(metrics["by_component"].total, whole["by_component"].total, rtol=2e-5)
        np.testing.assert_allclose(metrics["by_component"].total.sum(), metrics["loss"].total, rtol=1e-5)


def test_an_evaluation_starts_with_zeros_of_the_shapes_that_it_sums():
    config = small(**SHAPES["encoder_decoder"])
    config = auto.resolve_auto(config, meshes.make_mesh(config, jax.devices()[:1]))
    batch, other = batch_of(config), batch_of(config, seed=1)
    params = begun_alone("encoder_decoder").params
    zeros, evaluate = eval_step.zero_metrics(config, params, batch), jax.jit(eval_step.make_eval_step(config))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(zeros))
    both = evaluate(params, other, evaluate(params, batch, zeros))
    metrics_of = jax.jit(lambda batch: step.pretrain_loss(config, params, batch, None).metrics)
    parts = [metrics_of(each) for each in (batch, other)]
    jax.tree.map(lambda total, *each: np.testing.assert_allclose(total, sum(each), rtol=1e-5), both, *parts)
    assert both["by_component"].total.shape == (4,)


def test_an_update_that_is_not_finite_is_skipped_and_counted_also_if_only_the_second_moment_is_damaged(learner):
    state, batch = learner.begin(), learner.batch
    poisoned = batch._replace(weights_BL=np.full_like(batch.weights_BL, np.nan))
    damage = lambda name, leaf: leaf.at[3, 0].set(jnp.nan) if name.endswith("nu/embedding") else leaf
    state, _ = learner.update(state, batch)  # now the average is not the parameters
    for number, rows in enumerate((poisoned, batch), start=2):
        before = jax.device_get(state)
        state, metrics = learner.update(state, rows)
        assert metrics["skipped_updates"].total == 1 and state.step == number
        assert np.isfinite(metrics["grad_norm"].total) == (rows is batch)
        jax.tree.map(np.testing.assert_array_equal, before[1:], jax.device_get(state)[1:])
        state = state._replace(opt_state=tree.map_named(damage, state.opt_state))


def test_the_moving_average_follows_its_formula(learner):
    state = learner.begin()
    first = jax.device_get(state.params)
    jax.tree.map(np.testing.assert_array_equal, first, state.ema)
    state, _ = learner.update(state, learner.batch)
    jax.tree.map(
        lambda ema, old, new: np.testing.assert_allclose(ema, 0.9 * old + 0.1 * new, rtol=1e-5, atol=1e-7),
        state.ema,
        first,
        state.params,
    )


def test_the_loss_falls_when_the_same_batch_is_learned(learner):
    state, losses = learner.begin(), []
    for _ in range(30):
        state, metrics = learner.update(state, learner.batch)
        losses.append(metrics["loss"].total / metrics["loss"].weight)
    assert losses[-1] < losses[0] - 2


@pytest.mark.parametrize(
    "sections, devices, message",
    [
        ({"mesh": {"data": 3}}, 8, "does not fit 8 devices.*1, 2, 4, 8"),
        ({"mesh": {"tensor": 3}}, 8, "does not fit 8 devices"),
        ({"mesh": {"data": 1, "tensor": 8}}, 8, "mesh.tensor=8 must divide model.num_heads=4; use mesh.tensor=4"),
        ({"data": {"batch_size": 12}}, 8, "data.batch_size=12 must be a multiple of 8 .*; use 8 or 16"),
        ({"data": {"batch_size": 4}}, 8, "data.batch_size=4 must be a multiple of 8 .*; use 8"),
        (
            {"mesh": {"context": 8}, "data": {"inputs_length": 36}},
            8,
            "mesh.context=8 must divide data.inputs_length=36; use mesh.context=4 or a length of 40",
        ),
        (
            {"mesh": {"slices": 3}, "data": {"batch_size": 24}},
            8,
            "mesh.slices=3 must divide .*; use .*slices=1",
        ),
    ],
)
def test_an_impossible_mesh_is_refused_with_values_that_work(sections, devices, message):
    with pytest.raises(ConfigError, match=message):
        meshes.make_mesh(small(**sections), jax.devices()[:devices])


def test_the_memory_of_a_step_falls_as_context_grows():
    def memory(context):
        sections = {
            "data": {"inputs_length": 250, "targets_length": 6},
            "model": {"architecture": "decoder", "kernels": "plain"},
        }
        config = small(**sections, mesh={"data": 1, "context": context})
        mesh = meshes.make_mesh(config, jax.devices()[:context])
        config, batch = auto.resolve_auto(config, mesh), random_batch(config)
        compiled = step.lower_train_step(config, batch, train_state.abstract_state(config, batch, mesh)).compile()
        return compiled.memory_analysis().temp_size_in_bytes  # of each device

    assert memory(4) < 0.35 * memory(1)


class Device(NamedTuple):
    """What a mesh asks of a device."""

    id: int
    slice_index: int
    platform: str
    process_index: int = 0


def test_slices_come_first_along_data_and_must_be_those_of_the_devices():
    gpus = [Device(i, (i // 2) % 2, "gpu") for i in range(8)]  # 0 1 of slice 0, 2 3 of slice 1, 4 5 of slice 0, ...
    grid = meshes.arrange(gpus, (4, 1, 2, 1), 2)
    assert [[device.id for device in row] for row in grid[:, 0, :, 0]] == [[0, 1], [4, 5], [2, 3], [6, 7]]
    for slices, use in ((1, 4), (8, 4)):
        with pytest.raises(ConfigError, match=f"mesh.slices={slices} does not fit the 4 slices .*; use {use}"):
            meshes.arrange([Device(i, i // 2, "tpu") for i in range(8)], (8, 1, 1, 1), slices)
    whole = [device.id for device in meshes.make_mesh(small(mesh={"slices": 2})).devices.flat]
    assert whole == [device.id for device in jax.devices()]


def test_a_length_that_context_does_not_divide_is_not_split():
    config = small(data={"targets_length": 13}, mesh={"data": 1, "context": 2})
    config, mesh, abstract, update = program_of(config, 2)
    state = begun(config, batch := random_batch(config), abstract)
    loss_of = jax.jit(lambda params: step.pretrain_loss(config, params, batch, None).metrics["loss"])
    alone = loss_of(jax.device_get(state.params))
    with jax.set_mesh(mesh):
        _, metrics = update(state, placement.to_global(batch, mesh, 8))
    np.testing.assert_allclose(metrics["loss"].total, alone.total, rtol=1e-5)
    assert jnp.isfinite(metrics["grad_norm"].total)


def test_evaluation_by_microbatches_takes_less_memory_and_sums_the_same():
    config = small(model={"architecture": "decoder"}, train={"microbatches": 4})
    whole = dataclasses.replace(config, train=dataclasses.replace(config.train, microbatches=1))
    batch = random_batch(config)
    params = drawn_params(config, batch)
    start = jax.tree.map(lambda zero: zero + 1, eval_step.zero_metrics(config, params, batch))
    programs = [
        jax.jit(eval_step.make_eval_step(each)).lower(params, batch, start).compile() for each in (whole, config)
    ]
    one, four = (program(params, batch, start) for program in programs)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), four, one)
    held, less = (program.memory_analysis().temp_size_in_bytes for program in programs)
    assert less < held / 2


def test_frozen_parameters_cost_no_gradient_do_not_count_in_its_norm_and_can_not_spoil_an_update():
    first = begun_alone("encoder_decoder")

    def updated(loss_fn, **optimizer):
        config = small(**SHAPES["encoder_decoder"], optimizer=optimizer)
        config = auto.resolve_auto(config, mesh := meshes.make_mesh(config, jax.devices()[:1]))
        abstract = train_state.abstract_state(config, batch := batch_of(config), mesh)
        program = step.lower_train_step(config, batch, abstract, loss_fn).compile()
        state = first._replace(params=jax.tree.map(jnp.copy, first.params))
        optimizer = make_optimizer(config, state.params, train_state.parameter_axes(config, batch))
        state = state._replace(step=jnp.zeros((), jnp.int32), opt_state=optimizer.init(state.params))
        return program, *program(jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract)), batch)

    def spoiled(config, params, batch, key):  # its gradient with respect to the embedding is not finite
        loss = step.pretrain_loss(config, params, batch, key)
        return loss._replace(objective=loss.objective + jnp.sqrt(params["embedding"] * 0).sum())

    whole, _, unfrozen = updated(step.pretrain_loss)
    frozen, state, metrics = updated(spoiled, frozen=("(?!decoder/final_norm).*",))
    assert frozen.cost_analysis()["flops"] < 0.5 * whole.cost_analysis()["flops"]
    assert frozen.memory_analysis().temp_size_in_bytes < 0.5 * whole.memory_analysis().temp_size_in_bytes
    assert 0 < metrics["grad_norm"].total < 0.5 * unfrozen["grad_norm"].total and metrics["skipped_updates"].total == 0
    same = jax.tree.map(lambda new, old: bool((new == old).all()), state.params, first.params)
    assert [name for name, equal in tree.flatten(same).items() if not equal] == ["decoder/final_norm/scale"]
