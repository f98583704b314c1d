"""One flipped bit on one device is found, and the device is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from t5like import tree
from t5like.checkpoint.checkpoints import Checkpoints
from t5like.errors import ProcessLost
from t5like.optim import step
from t5like.train.replicas import compare_replicas, differing_devices
from t5like.types import TrainState


def state_on(mesh):
    """Leaves that are sharded over fsdp, over both axes, and replicated everywhere; float32, bfloat16, int32."""
    rng = np.random.default_rng(0)
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    params = {
        "kernel": place(jnp.asarray(rng.normal(size=(16, 12)), jnp.float32), "fsdp"),
        "scale": place(jnp.asarray(rng.normal(size=12), jnp.bfloat16)),
    }
    moments = {"whole": place(jnp.ones((16, 4)), ("data", "fsdp"))}
    return TrainState(place(jnp.int32(5)), params, moments)


def flipped(leaf, device, element=0, bit=0):
    """The leaf with one bit of one element flipped in the buffer of one device."""
    parts = []
    for shard in leaf.addressable_shards:
        part = np.array(shard.data)
        if shard.device == device:
            part.reshape(-1).view(f"u{part.dtype.itemsize}")[element] ^= 1 << bit
        parts.append(jax.device_put(part, shard.device))
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)


@pytest.fixture
def mesh():
    return jax.make_mesh((4, 2), ("data", "fsdp"))


def test_equal_replicas_are_equal(mesh):
    assert differing_devices(state_on(mesh)) == {}
    compare_replicas(state_on(mesh), 5, lambda: pytest.fail("the replicas are equal"))


@pytest.mark.parametrize("name, element, bit", [("params/kernel", 3, 0), ("params/scale", 11, 15), ("step", 0, 7)])
def test_a_flipped_bit_of_one_replica_is_found_and_its_device_named(mesh, name, element, bit):
    device = mesh.devices[2, 1]
    damage = lambda leaf_name, leaf: flipped(leaf, device, element, bit) if leaf_name == name else leaf
    state = tree.map_named(damage, state_on(mesh))
    assert differing_devices(state) == {device: name}
    with pytest.raises(ProcessLost, match=f"after step 5: process 0, {device}: {name}; nothing is saved") as error:
        compare_replicas(state, 5, lambda: None)
    assert error.value.exit_code == 76


def test_of_two_replicas_that_differ_both_are_named():
    mesh = jax.make_mesh((2, 1), ("data", "fsdp"), devices=jax.devices()[:2])
    state = state_on(mesh)
    state = state._replace(params=state.params | {"kernel": flipped(state.params["kernel"], mesh.devices[1, 0])})
    assert set(differing_devices(state)) == set(mesh.devices.flat)


def test_a_leaf_that_no_other_device_holds_can_not_be_compared(mesh):
    state = state_on(mesh)
    state = state._replace(opt_state={"whole": flipped(state.opt_state["whole"], mesh.devices[0, 0])})
    assert differing_devices(state) == {}


def test_a_run_ends_within_the_configured_number_of_steps_and_saves_nothing_after_the_flip(
    command, decoder_flags, tmp_path, monkeypatch
):
    compile_train_step = step.compile_train_step

    def with_a_flip(*arguments):
        program = compile_train_step(*arguments)

        def run(state, batch):
            state, metrics = program(state, batch)
            if int(state.step) == 3:
                damage = lambda name, leaf: flipped(leaf, jax.devices()[5]) if name == "params/head" else leaf
                state = tree.map_named(damage, state)
            return state, metrics

        return run

    monkeypatch.setattr(step, "compile_train_step", with_a_flip)
    values = {"num_steps": 8, "compare_replicas_every": 2, "checkpoint_every": 2, "eval_batches": 1}
    settings = [f"--config.train.{name}={value}" for name, value in values.items()]
    settings.append("--config.model.init=t5")  # an update rounds the lowest bit of a smaller value away
    code, _, err = command("train", *decoder_flags, f"--workdir={tmp_path}/run", "--fake_devices=8", *settings)
    assert code == 76 and f"replicas differ after step 4: process 0, {jax.devices()[5]}: params/head; nothing" in err
    assert Checkpoints(tmp_path / "run" / "checkpoints", keep=9).steps() == [2]
