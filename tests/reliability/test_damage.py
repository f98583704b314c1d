"""Damage to the files of a checkpoint: every change of a value is found, and the checkpoint before it is used."""

import random
import re
import shutil
from pathlib import Path

import pytest
from runs import LAST, assert_restorable, checkpoints, restored, smallest

from t5like.errors import CheckpointError

FLIPS = 60


@pytest.fixture
def run(straight, tmp_path) -> Path:
    """A copy of a finished run with three checkpoints."""
    return Path(shutil.copytree(straight, tmp_path / "run"))


def test_every_flip_in_a_checkpoint_is_found_or_changes_no_value(run, capfd):
    chosen = random.Random(0)
    path = run / "checkpoints" / str(LAST)
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.stat().st_size]
    data = max(files, key=lambda file: file.stat().st_size)
    pristine = {file: file.read_bytes() for file in files}
    expected = restored(run)
    found, places = 0, [data] * (FLIPS // 2) + chosen.choices(files, k=FLIPS // 2)
    for file in places:
        raw = bytearray(pristine[file])
        raw[chosen.randrange(len(raw))] ^= 1 << chosen.randrange(8)
        file.write_bytes(raw)
        try:
            actual = restored(run)
        except CheckpointError as error:
            assert str(path) in str(error)
            found += 1
        else:
            assert all(actual[name].tobytes() == expected[name].tobytes() for name in expected), file
        file.write_bytes(pristine[file])
    assert assert_restorable(run) == LAST
    assert found >= FLIPS // 4, f"only {found} of {FLIPS} flips were found"  # others are in bytes that nobody reads


def truncate(path: Path) -> None:
    for data in path.rglob("d/*"):
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])


def flip(path: Path) -> None:
    """Flip a bit in every KiB: the files have bytes that nobody reads."""
    for data in path.rglob("d/*"):
        raw = bytearray(data.read_bytes())
        raw[500::1024] = bytes(byte ^ 1 for byte in raw[500::1024])
        data.write_bytes(raw)


def half_deleted(path: Path) -> None:
    shutil.rmtree(path / "state")


def only_a_commit_file(path: Path) -> None:
    for entry in path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "commit_success.txt":
            entry.unlink()


@pytest.mark.parametrize(
    "damage, count",
    [(truncate, 1), (flip, 2), (half_deleted, 2), (only_a_commit_file, 1)],
    ids=["truncated", "flipped", "half deleted", "only a commit file"],
)
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_continues(
    damage, count, run, straight, flags, command
):
    for step in (LAST, LAST - 5)[:count]:
        damage(run / "checkpoints" / str(step))
    code, out, err = command(*smallest(flags, run), "--fake_devices=1")
    assert code == 0, err
    before = LAST - 5 * count
    assert f"after step {before}" in out
    aside = [path.name for path in (run / "checkpoints").iterdir() if re.match(rf"({LAST}|{LAST - 5})\D", path.name)]
    assert len(aside) == count and all(name.split(".")[0] in err + out for name in aside), (aside, err)
    assert checkpoints(run).steps() == checkpoints(straight).steps()


def test_without_a_valid_checkpoint_the_run_ends_with_4_and_nothing_is_lost(run, flags, command):
    for step in checkpoints(run).steps():
        flip(run / "checkpoints" / str(step))
    code, _, err = command(*smallest(flags, run))
    assert code == 4 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("t5like: no checkpoint can be read: ") and str(run / "checkpoints") in err
    assert len([path for path in (run / "checkpoints").iterdir() if path.is_dir()]) == 3
