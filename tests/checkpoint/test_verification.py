"""A checkpoint is verified on the host: each changed bit is found, and the digests equal those of the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_states import new_state, saved
from test_recovery import DAMAGES, flip, largest_file

from t5like.checkpoint import digests
from t5like.checkpoint.digests import describe, digest, digest_block
from t5like.checkpoint.state_leaves import leaves_of
from t5like.checkpoint.verification import damaged_leaves
from t5like.errors import DamagedCheckpoint


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(), (7,), (6, 5), (4, 3, 10)])
def test_blocks_on_the_host_have_the_digest_of_the_device(rng, dtype, shape):
    x = np.asarray(jnp.asarray(rng.normal(size=shape)).astype(dtype))
    want = tuple(map(int, digest(jnp.asarray(x))[:2]))
    assert digest_block(x, (0,) * x.ndim, shape) == want
    if x.ndim > 1:
        columns = [
            digest_block(x[:, part], (0, part.start, 0)[: x.ndim], shape) for part in (slice(0, 2), slice(2, 99))
        ]
        assert tuple(sum(lane) % 2**32 for lane in zip(*columns, strict=True)) == want


@pytest.mark.parametrize("axes", [{"data": 1}, {"fsdp": 4, "tensor": 2}])
def test_a_small_state_is_examined_without_a_program_and_with_the_same_result(axes, monkeypatch):
    leaves = leaves_of(new_state(1, **axes))
    name = next(name for name, leaf in leaves.items() if leaf.ndim == 2 and leaf.dtype == jnp.float32)
    values = np.array(leaves[name])
    values[1, 1] = np.nan
    leaves[name] = jax.device_put(values, leaves[name].sharding)
    with monkeypatch.context() as patch:
        patch.setattr(digests, "digest", None)
        found = digests.examine(leaves)
    assert found[1] == [name]
    monkeypatch.setattr(digests, "HOST_BYTES", 0)
    assert digests.examine(leaves) == found


@pytest.mark.parametrize("axes", [{"data": 1}, {"fsdp": 4, "tensor": 2}])
def test_a_good_checkpoint_of_any_mesh_is_verified(tmp_path, axes):
    checkpoints = saved(tmp_path / "run", 1, rows=1 << 12, **axes)
    checkpoints.verify(1)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_without_devices(tmp_path, damage):
    checkpoints = saved(tmp_path / "run", 1, rows=1 << 12)
    damage(tmp_path / "run" / "1")
    with pytest.raises(DamagedCheckpoint) as error:
        checkpoints.verify(1)
    assert "\n" not in str(error.value)


def test_each_flip_that_changes_a_value_is_found_and_its_leaf_is_named(tmp_path):
    checkpoints = saved(tmp_path / "run", 1, rows=1 << 12)
    leaves = checkpoints.meta(1).leaves
    data = largest_file(tmp_path / "run" / "1")
    content = data.read_bytes()
    found = 0
    for position in np.linspace(0, len(content) - 1, 40, dtype=int):
        changed = bytearray(content)
        changed[position] ^= 0x10
        data.write_bytes(changed)
        damaged = damaged_leaves(tmp_path / "run" / "1", leaves)
        found += bool(damaged)
        assert all(text.partition(" ")[0] in leaves for text in damaged)
    data.write_bytes(content)
    assert found >= 38 and not damaged_leaves(tmp_path / "run" / "1", leaves)


def test_a_missing_chunk_is_not_read_as_zeros(tmp_path):
    state = jax.tree.map(lambda leaf: leaf + 1 if leaf.dtype == jnp.float32 else leaf, new_state(1, rows=1 << 12))
    checkpoints = saved(tmp_path / "run", 1, rows=1 << 12)
    leaves = checkpoints.meta(1).leaves
    other = describe({"params/encoder/kernel": state.params["encoder"]["kernel"]})
    assert damaged_leaves(tmp_path / "run" / "1", leaves | other) == ["params/encoder/kernel is not what was saved"]
    renamed = {"params/absent": leaves["params/encoder/kernel"]}
    [text] = damaged_leaves(tmp_path / "run" / "1", renamed)
    assert text.startswith("params/absent can't be read (")


def test_flipped_files_are_reported_by_leaf(tmp_path):
    checkpoints = saved(tmp_path / "run", 1, rows=1 << 12)
    flip(tmp_path / "run" / "1")
    with pytest.raises(DamagedCheckpoint, match="/1 is damaged: what was read is not what was saved in "):
        checkpoints.verify(1)
