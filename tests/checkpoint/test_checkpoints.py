"""Checkpoints: exact on any mesh, refused if they do not fit or are damaged, never lost by a kill or a full disk."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_states import REST, assert_bitwise, new_state, on_mesh, saved

from t5like.checkpoint import digests, metadata
from t5like.checkpoint.checkpoints import Checkpoints
from t5like.checkpoint.digests import describe, digest
from t5like.checkpoint.orbax_adapter import checkpoint_errors
from t5like.checkpoint.step_directories import COMMITTED
from t5like.errors import CheckpointError
from t5like.types import TrainState

MESHES = [{"data": 8}, {"fsdp": 4, "tensor": 2}, {"data": 1}]


@pytest.mark.parametrize("before", MESHES)
@pytest.mark.parametrize("after", MESHES)
def test_a_state_is_restored_bitwise_on_any_mesh(tmp_path, before, after):
    state = new_state(3, **before)
    abstract = on_mesh(state, **after)
    restored = saved(tmp_path, 3, **before).restore(abstract)
    assert_bitwise(restored, state)
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == jax.tree.map(lambda leaf: leaf.sharding, abstract)


def test_the_moving_average_is_optional_and_can_be_read_alone(tmp_path):
    state = new_state(1, data=8)
    ema = jax.tree.map(lambda leaf: leaf + 1, state.params)
    checkpoints = saved(tmp_path / "plain", 1)
    with pytest.raises(CheckpointError, match="ema/decoder/kernel is missing"):
        checkpoints.restore_params(on_mesh(state.params, data=1), ema=True)
    checkpoints = Checkpoints(tmp_path / "ema", keep=1)
    checkpoints.save(state._replace(ema=ema), **REST)
    checkpoints.close()
    assert_bitwise(checkpoints.restore_params(on_mesh(ema, data=1), ema=True), ema)
    assert_bitwise(checkpoints.restore_params(on_mesh(ema, data=1)), state.params)


def test_metadata_is_restored(tmp_path):
    meta = saved(tmp_path, 3, 4).meta(3)
    assert (meta.step, meta.config, meta.tokenizer, meta.tokenizer_hash) == (3, *REST.values())
    assert meta.versions["jax"] == jax.__version__
    assert meta.leaves["params/encoder/kernel"].shape == (16, 12)


def test_buffers_may_be_donated_while_the_save_runs(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    state = new_state(5, rows=1 << 16)
    want = jax.tree.map(np.array, state)
    checkpoints.save(state, **REST)
    spoil = jax.jit(lambda state: jax.tree.map(lambda x: ~x if x.dtype == bool else x + 1, state), donate_argnums=0)
    for _ in range(3):
        state = spoil(state)
    jax.block_until_ready(state)
    checkpoints.close()
    assert_bitwise(checkpoints.restore(on_mesh(state, data=1)), want)


def without(tree: dict, name: str) -> dict:
    return {key: leaf for key, leaf in tree.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s._replace(params=without(s.params, "decoder")), "params/decoder/kernel is not in this model"),
        (lambda s: s._replace(params=s.params | {"head": s.step}), "params/head is missing"),
        (
            lambda s: s._replace(step=jax.ShapeDtypeStruct((), jnp.uint32, sharding=s.step.sharding)),
            r"step is int32\[\], not uint32\[\]",
        ),
        (
            lambda s: s._replace(
                params=s.params
                | {"decoder": {"kernel": jax.ShapeDtypeStruct((5, 8), jnp.float32, sharding=s.step.sharding)}}
            ),
            r"params/decoder/kernel is float32\[8, 5\], not float32\[5, 8\]",
        ),
        (
            lambda s: s._replace(opt_state=()),
            r"opt_state/1/0/count is not in this model; .*; and \d+ more; use the config",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message) as error:
        saved(tmp_path, 1).restore(change(on_mesh(new_state(), data=1)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("params", [{"a.b": 1}, {"a/b": 1}, {"": 1}, [{"0": 1}, {".": 2}]])
def test_names_that_may_collide_on_disk_are_refused(tmp_path, params):
    state = TrainState(jnp.int32(0), jax.tree.map(jnp.float32, params), ())
    with pytest.raises(CheckpointError, match="whose names may collide on disk: params/"):
        Checkpoints(tmp_path, keep=1).save(state, **REST)
    assert not list(tmp_path.iterdir())


def lanes(x) -> tuple[int, int]:
    return describe({"x": x})["x"].digest


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "uint32", "bfloat16", "float16", "float32"])
def test_a_digest_depends_on_every_bit_and_position_but_not_on_the_mesh(dtype):
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 2 if dtype == "bool" else 256, (16, 4 * jnp.dtype(dtype).itemsize), np.uint8)
    x = raw.view(jnp.dtype(dtype))
    seen = {lanes(x), lanes(x[::-1]), lanes(x[:, ::-1])}
    for position in rng.permutation(raw.size)[:30]:
        other = raw.copy()
        other.flat[position] ^= 1
        seen.add(lanes(other.view(x.dtype)))
    assert len(seen) == 33
    for axes in MESHES:
        assert lanes(jax.device_put(x, on_mesh(jnp.asarray(x), **axes).sharding)) == lanes(x)


def test_a_digest_equals_its_definition():
    def mix(h):
        h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
        return h ^ (h >> 16)

    x = np.arange(6, dtype=np.float32).reshape(2, 3) - 2.5
    bits = [int(value) for value in x.view(np.uint32).flat]
    want = tuple(
        sum(mix(value ^ ((i * key + (key >> 1)) % 2**32)) for i, value in enumerate(bits)) % 2**32
        for key in (0x9E3779B1, 0x7FEB352D)
    )
    assert lanes(x) == want


def test_flipped_bits_are_never_restored(tmp_path):
    checkpoints, want = saved(tmp_path, 1, rows=1 << 12), new_state(1, rows=1 << 12)
    abstract = on_mesh(want, data=1)
    data = max((tmp_path / "1" / "state").rglob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    whole = data.read_bytes()
    damaged = 0
    for position in np.linspace(0, len(whole) - 1, 12, dtype=int):
        flipped = bytearray(whole)
        flipped[position] ^= 0x10
        data.write_bytes(flipped)
        try:
            assert_bitwise(checkpoints.restore(abstract), want)
        except CheckpointError as error:
            damaged += "is damaged: what was read is not what was saved in" in str(error)
    assert damaged >= 3  # Orbax reads these without an error


def test_damaged_files_raise_an_error_of_one_line(tmp_path):
    checkpoints = saved(tmp_path / "checkpoints", 1, 2)
    abstract, want = on_mesh(new_state(), data=1), new_state(2)
    shutil.copytree(tmp_path / "checkpoints" / "2", tmp_path / "whole")
    errors = 0
    for path in [path for path in (tmp_path / "whole").rglob("*") if path.is_file()]:
        for damage in ("truncate", "delete"):
            victim = tmp_path / "checkpoints" / "2" / path.relative_to(tmp_path / "whole")
            victim.unlink()
            if damage == "truncate":
                victim.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            try:
                assert_bitwise(checkpoints.restore(abstract, 2), want)
            except CheckpointError as error:
                errors += 1
                assert "\n" not in str(error) and str(tmp_path) in str(error)
            shutil.copy(path, victim)
    assert errors >= 8


def test_changed_metadata_and_newer_formats_are_refused(tmp_path):
    checkpoints = saved(tmp_path, 1)
    path = tmp_path / "1" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"body": meta["body"] | {"tokenizer_hash": "another"}}))
    with pytest.raises(CheckpointError, match="checksum does not match"):
        checkpoints.meta()
    path.write_text(json.dumps(meta | {"format": metadata.FORMAT + 1}))
    with pytest.raises(CheckpointError, match="install a newer t5like"):
        checkpoints.meta()


def test_only_committed_checkpoints_are_listed(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    (tmp_path / "2" / COMMITTED).unlink()
    for stray in ("9", "7", "5/theirs", "7.orbax-checkpoint-tmp", "notes"):  # 9 and 7: killed when just made
        (tmp_path / stray).mkdir(parents=True)
    assert (checkpoints.steps(), checkpoints.latest()) == ([1], 1)
    with pytest.raises(CheckpointError, match="no complete checkpoint of step 2; there are 1"):
        checkpoints.restore(on_mesh(new_state(), data=1), 2)
    assert saved(tmp_path, 9).steps() == [1, 9]
    assert not (tmp_path / "2").exists() and not (tmp_path / "7").exists()
    assert (tmp_path / "5" / "theirs").exists() and (tmp_path / "notes").exists()
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        Checkpoints(tmp_path / "empty", keep=1).meta()


def test_the_newest_checkpoints_and_the_multiples_are_kept(tmp_path):
    assert saved(tmp_path, 2, 4, 5, 6, 10, 11, 12, keep=2, keep_every=5).steps() == [5, 10, 11, 12]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "11", "12", "5", "run_id"]


def test_a_relative_path_is_resolved_when_checkpoints_are_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints(Path("run/checkpoints"), keep=1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    checkpoints.save(new_state(1), **REST)
    checkpoints.close()
    assert (tmp_path / "run/checkpoints/1" / COMMITTED).exists()


def test_a_full_disk_raises_an_error_and_leaves_no_files(tmp_path):
    checkpoints = saved(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    state = new_state(rows=1 << 14)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        for step in (2, 3):
            checkpoints.save(state._replace(step=jnp.int32(step)), **REST)
            with pytest.raises(CheckpointError, match=f"/{step} could not be written: .*File too large") as error:
                checkpoints.wait()
            assert "\n" not in str(error.value)
            assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "run_id"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoints.save(new_state(4), **REST)
    checkpoints.close()
    assert checkpoints.steps() == [1, 4]


def test_a_long_error_of_the_storage_is_shortened_to_the_reason_of_the_system(tmp_path):
    message = f"Error opening zarr driver: {'x' * 300}: File too large [os_error_code='27'] {'y' * 300}"
    expected = pytest.raises(CheckpointError, match=r"can't be read: Error opening .* \.\.\. File too large$")
    with expected, checkpoint_errors(tmp_path, "can't be read"):
        raise ValueError(message)


def test_a_directory_that_can_not_be_created_raises_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file.* can't be"):
        Checkpoints(tmp_path / "file" / "checkpoints", keep=1).save(new_state(1), **REST)


def run(program: str, directory: Path) -> subprocess.Popen:
    """Start a program that imports this file's names, in a process that may be killed or limited."""
    header = "import sys\nsys.path[:0] = ['.', 'tests', 'tests/checkpoint']\nfrom test_checkpoints import *\n"
    header += "checkpoints = saved(sys.argv[1])\n"
    return subprocess.Popen(
        [sys.executable, "-c", header + textwrap.dedent(program), str(directory)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )


def test_a_failed_save_prints_nothing_but_its_error_and_that_it_is_tried_again(tmp_path):
    output, noise = run(
        """
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        checkpoints.save(new_state(1, rows=1 << 14), **REST)
        try:
            checkpoints.close()
        except CheckpointError as error:
            print(error)
    """,
        tmp_path,
    ).communicate(timeout=60)
    assert "could not be written" in output and output.count("\n") == 1
    assert noise.endswith("; saving again in 0.5 s\n") and noise.count("\n") == 1


def test_a_killed_save_does_not_damage_other_checkpoints(tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(2):
        with run(
            """
            for step in range(1 + (checkpoints.latest() or 0), 10_000):
                checkpoints.save(new_state(step, rows=1 << 14), **REST)
                print(step, flush=True)  # of which the one before is complete
        """,
            tmp_path,
        ) as process:
            begun = [int(process.stdout.readline()) for _ in range(3)]
            time.sleep(rng.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
            begun += [int(line) for line in process.stdout.read().split()]
        checkpoints = Checkpoints(tmp_path, keep=2)
        assert checkpoints.latest() in (begun[-1] - 1, begun[-1], begun[-1] + 1)
        want = new_state(checkpoints.latest(), rows=1 << 14)
        assert_bitwise(checkpoints.restore(on_mesh(want, data=1)), want)
    checkpoints.save(new_state(99_999), **REST)
    checkpoints.close()
    assert len(list(tmp_path.iterdir())) == 3  # two checkpoints and run_id


def test_the_digest_of_a_large_array_does_not_depend_on_parts(rng, monkeypatch):
    monkeypatch.setattr(digests, "HOST_BYTES", 0)
    monkeypatch.setattr(digests, "PART_BYTES", 100)
    for shape in [(), (7,), (7, 3, 2), (300,), (2, 500)]:  # bytes of a row below and above a part's, a rest at the end
        x = jnp.asarray(rng.normal(size=shape), jnp.float32)
        assert describe({"x": x})["x"].digest == tuple(map(int, digest(x)[:2])), shape
