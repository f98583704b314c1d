"""A damaged checkpoint is reported and passed over; it is renamed only when an earlier one could be read."""

import json
import shutil
from pathlib import Path

import pytest
from small_states import assert_bitwise, new_state, on_mesh, saved

from t5like.checkpoint import recovery, run_directory
from t5like.checkpoint.checkpoints import Checkpoints
from t5like.checkpoint.step_directories import COMMITTED
from t5like.errors import CheckpointError, DamagedCheckpoint


def largest_file(checkpoint: Path) -> Path:
    return max((checkpoint / "state").rglob("d/*"), key=lambda path: path.stat().st_size)


def flip(checkpoint: Path) -> None:
    """Change bits of the parameters: Orbax restores them without an error."""
    data = largest_file(checkpoint)
    content = bytearray(data.read_bytes())
    for position in range(len(content) // 4, len(content) * 3 // 4, 50):
        content[position] ^= 0x10
    data.write_bytes(content)


def truncate(checkpoint: Path) -> None:
    for data in (checkpoint / "state").rglob("d/*"):
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])


def half_delete(checkpoint: Path) -> None:
    """Delete everything but the commit file, as `rm -r` that was interrupted."""
    for path in checkpoint.iterdir():
        if path.name != COMMITTED:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def change_metadata(checkpoint: Path) -> None:
    path = checkpoint / "meta" / "metadata"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"body": values["body"] | {"tokenizer_hash": "another"}}))


DAMAGES = [flip, truncate, half_delete, change_metadata]


def restore_newest(checkpoints: Checkpoints) -> recovery.Readable:
    abstract = on_mesh(new_state(rows=1 << 12), data=1)
    return recovery.newest_readable(checkpoints, checkpoints.steps(), lambda step: checkpoints.restore(abstract, step))


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_one_before_a_damaged_checkpoint_is_used(tmp_path, capsys, damage):
    checkpoints = saved(tmp_path / "run", 1, 2, rows=1 << 12)
    damage(tmp_path / "run" / "2")
    readable = restore_newest(checkpoints)
    assert readable.step == 1 and list(readable.damaged) == [2]
    assert_bitwise(readable.value, new_state(1, rows=1 << 12))
    before = sorted(path.name for path in (tmp_path / "run" / "2").rglob("*"))

    recovery.set_aside(checkpoints, readable)
    assert checkpoints.steps() == [1]
    [kept] = (tmp_path / "run").glob("2.damaged-*")
    assert sorted(path.name for path in kept.rglob("*")) == before
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"it is kept as {kept.name}, and the run continues after step 1" in err


def test_two_damaged_checkpoints_in_a_row_are_passed_over_and_saved_again(tmp_path, capsys):
    checkpoints = saved(tmp_path / "run", 1, 2, 3, rows=1 << 12)
    flip(tmp_path / "run" / "3")
    half_delete(tmp_path / "run" / "2")
    readable = restore_newest(checkpoints)
    recovery.set_aside(checkpoints, readable)
    assert (readable.step, list(readable.damaged)) == (1, [3, 2])
    assert capsys.readouterr().err.count("WARNING") == 2
    assert saved(tmp_path / "run", 2, 3, rows=1 << 12).steps() == [1, 2, 3]
    assert len(list((tmp_path / "run").glob("*.damaged-*"))) == 2


def test_without_any_good_checkpoint_nothing_is_renamed(tmp_path):
    checkpoints = saved(tmp_path / "run", 1, 2, rows=1 << 12)
    for step in ("1", "2"):
        truncate(tmp_path / "run" / step)
    with pytest.raises(
        DamagedCheckpoint, match=r"no checkpoint can be read: .*/2.*the others neither \(2, 1\)"
    ) as error:
        restore_newest(checkpoints)
    assert "\n" not in str(error.value) and error.value.exit_code == 4
    assert checkpoints.steps() == [1, 2]


def test_a_checkpoint_of_another_step_or_run_is_refused_instead_of_passed_over(tmp_path):
    checkpoints = saved(tmp_path / "run", 1, rows=1 << 12)
    shutil.copytree(tmp_path / "run" / "1", tmp_path / "run" / "7")
    with pytest.raises(CheckpointError, match="/7 was saved as step 1, not 7; rename it") as error:
        restore_newest(checkpoints)
    assert not isinstance(error.value, DamagedCheckpoint)
    shutil.rmtree(tmp_path / "run" / "7")
    saved(tmp_path / "other", 7, rows=1 << 12)
    shutil.copytree(tmp_path / "other" / "7", tmp_path / "run" / "7")
    with pytest.raises(CheckpointError, match="/7 is a checkpoint of another run"):
        restore_newest(checkpoints)


def test_what_a_killed_save_has_left_is_reported_and_removed_by_the_next_save(tmp_path, capsys):
    checkpoints = saved(tmp_path / "run", 1, 2)
    (tmp_path / "run" / "2" / COMMITTED).unlink()
    recovery.report_incomplete(checkpoints)
    assert "/2 is incomplete: its save or its deletion was interrupted" in capsys.readouterr().err
    assert saved(tmp_path / "run", 3).steps() == [1, 3] and not (tmp_path / "run" / "2").exists()


def test_readers_use_an_earlier_checkpoint_with_a_warning_and_rename_nothing(trained, tmp_path, capsys):
    workdir = shutil.copytree(trained, tmp_path / "run")
    truncate(workdir / "checkpoints" / "2")
    before = sorted(map(str, workdir.rglob("*")))
    assert run_directory.load(workdir).step == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "WARNING" in err and "the checkpoint of step 1 is used instead" in err
    with pytest.raises(DamagedCheckpoint, match="checkpoints/2"):
        run_directory.load(workdir, step=2)
    assert sorted(map(str, workdir.rglob("*"))) == before
