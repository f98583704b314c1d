"""A save is verified, flushed, committed, and tried again after a failure; a state with NaN is never saved."""

import errno
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from small_states import REST, new_state, saved
from test_recovery import flip, truncate

from t5like.checkpoint import checkpoints as module
from t5like.checkpoint import step_directories
from t5like.checkpoint.checkpoints import Checkpoints
from t5like.checkpoint.saving import Saving
from t5like.checkpoint.step_directories import COMMITTED
from t5like.errors import CheckpointError, StateNotFinite


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(module, "PAUSES", (0.01, 0.01, 0.01))
    monkeypatch.setattr(module, "PAUSES_IF_FULL", (0.01,))


def failing(monkeypatch, where, name: str, number: int, times: int, when=lambda *_: True) -> list[int]:
    """Let a function of the system fail with an error number the first `times` times that `when(its arguments)`."""
    function, failures = getattr(where, name), []

    def fail(*arguments, **keywords):
        if len(failures) < times and when(*arguments):
            failures.append(number)
            raise OSError(number, os.strerror(number))
        return function(*arguments, **keywords)

    monkeypatch.setattr(where, name, fail)
    return failures


def after_save(directory: Path, *steps: int, keep: int = 2, **options) -> Checkpoints:
    checkpoints = Checkpoints(directory, keep=keep, **options)
    for step in steps:
        checkpoints.save(new_state(step), **REST)
        checkpoints.wait()
    return checkpoints


@pytest.mark.parametrize("part", ["params", "opt_state", "ema"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_never_saved(tmp_path, part, value):
    checkpoints = saved(tmp_path / "run", 3)
    state = new_state(4)._replace(ema=new_state(4).params)

    def spoil(path, leaf):
        values = np.array(leaf)
        if "decoder" in str(path) and leaf.ndim == 2:
            values[0, 0] = value
        return jax.device_put(values, leaf.sharding)

    spoiled = jax.tree_util.tree_map_with_path(spoil, getattr(state, part))
    with pytest.raises(
        StateNotFinite, match=f"after step 4 is not finite in {part}/.*newest checkpoint is that of step 3"
    ) as error:
        checkpoints.save(state._replace(**{part: spoiled}), **REST)
    assert error.value.exit_code == 5 and error.value.step == 4
    assert all(name.startswith(f"{part}/") and "decoder" in name for name in error.value.names)
    assert checkpoints.steps() == [3] and not (tmp_path / "run" / "4").exists()


def test_everything_is_flushed_before_the_commit_and_the_commit_before_a_deletion(tmp_path, monkeypatch):
    run = tmp_path / "run"
    events = []
    fsync, delete = os.fsync, step_directories.delete

    def recorded(descriptor):
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(("sync", name, (run / "3" / COMMITTED).exists()))
        return fsync(descriptor)

    after_save(run, 1, 2)
    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(step_directories, "delete", lambda path: (events.append(("delete", path)), delete(path)))
    assert after_save(run, 3).steps() == [2, 3]
    before = {event[1] for event in events if event[0] == "sync" and not event[2]}
    written = {path for path in (run / "3").rglob("*") if path != run / "3" / COMMITTED}
    assert written <= before and run / "3" in before
    order = [event[1] for event in events if event[0] == "delete" or event[2]]
    assert order == [run / "3" / COMMITTED, run / "3", run, tmp_path, run / "1"]


@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_checkpoint_that_was_written_wrongly_is_not_committed_and_no_older_one_is_deleted(
    tmp_path, monkeypatch, damage
):
    after_save(tmp_path / "run", 1, 2)
    check = Saving._check_written

    def damaged(self):
        damage(self._path)
        check(self)

    monkeypatch.setattr(Saving, "_check_written", damaged)
    checkpoints = Checkpoints(tmp_path / "run", keep=1)
    checkpoints.save(new_state(3, rows=1 << 12), **REST)
    with pytest.raises(CheckpointError, match="/3 could not be written: "):
        checkpoints.wait()
    assert checkpoints.steps() == [1, 2] and not (tmp_path / "run" / "3").exists()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_save_survives_storage_that_fails_for_a_moment(tmp_path, monkeypatch, capsys, number):
    after_save(tmp_path / "run", 1)
    failures = failing(monkeypatch, os, "fsync", number, times=2)
    checkpoints = after_save(tmp_path / "run", 2)
    assert len(failures) == 2 and checkpoints.steps() == [1, 2]
    checkpoints.verify(2)
    assert os.strerror(number) in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EROFS])
def test_storage_that_keeps_failing_is_an_error_and_leaves_the_earlier_steps(tmp_path, monkeypatch, number):
    after_save(tmp_path / "run", 1)
    failures = failing(monkeypatch, os, "fsync", number, times=10**6)
    checkpoints = Checkpoints(tmp_path / "run", keep=2)
    checkpoints.save(new_state(2), **REST)
    with pytest.raises(CheckpointError, match=rf"/2 could not be written: .*{os.strerror(number)}") as error:
        checkpoints.wait()
    assert "\n" not in str(error.value) and error.value.exit_code == 4
    assert 2 <= len(failures) <= 4 and checkpoints.steps() == [1]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["1", "run_id"]


def test_after_a_failed_save_of_a_donated_state_the_next_one_is_saved(tmp_path, monkeypatch, capsys):
    checkpoints = after_save(tmp_path / "run", 1)
    failures = failing(monkeypatch, os, "fsync", errno.EIO, times=1)
    state = new_state(2)
    checkpoints.save(state, **REST)
    jax.tree.map(lambda leaf: leaf.delete(), state)
    checkpoints.save(new_state(3), **REST)
    assert failures and checkpoints.steps() == [1, 3]  # completed at once
    assert "/2 could not be written" in capsys.readouterr().err


def test_training_may_continue_after_a_failed_save_but_not_end_with_one(tmp_path, monkeypatch, capsys):
    after_save(tmp_path / "run", 1)
    failing(monkeypatch, os, "fsync", errno.ENOSPC, times=10**6)
    checkpoints = Checkpoints(tmp_path / "run", keep=2, on_failed_save="continue")
    for step in (2, 3):
        checkpoints.save(new_state(step), **REST)
    assert "training continues" in capsys.readouterr().err
    checkpoints.save(new_state(4), **REST)
    checkpoints.save(new_state(5), **REST)
    assert checkpoints.steps() == [1]
    monkeypatch.undo()
    with pytest.raises(CheckpointError), monkeypatch.context() as again:
        again.setattr(module, "PAUSES_IF_FULL", (0.01,))
        failing(again, os, "fsync", errno.ENOSPC, times=10**6)
        checkpoints.save(new_state(6), **REST)
        checkpoints.wait()
        checkpoints.save(new_state(7), **REST)
        checkpoints.wait()


def test_a_failed_deletion_is_reported_and_made_up_for(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as context:
        context.setattr(module, "PAUSES", ())
        failing(context, shutil, "rmtree", errno.EIO, times=1)
        assert after_save(tmp_path / "run", 1, 2, 3).steps() == [2, 3]
    assert "/1 can't be deleted: " in capsys.readouterr().err
    after_save(tmp_path / "run", 4)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["3", "4", "run_id"]


@pytest.mark.parametrize("change", ["remove", "rename", "replace"])
def test_a_run_directory_that_is_removed_or_renamed_is_an_error_and_not_made_again(tmp_path, change):
    workdir = tmp_path / "run"
    workdir.mkdir()
    checkpoints = after_save(workdir / "checkpoints", 1)
    shutil.rmtree(workdir) if change == "remove" else workdir.rename(tmp_path / "moved")
    if change == "replace":
        workdir.mkdir()
    with pytest.raises(
        CheckpointError, match="run is not there any more|run was replaced by another directory"
    ) as error:
        checkpoints.save(new_state(2), **REST)
    assert "\n" not in str(error.value) and not (workdir / "checkpoints").exists()


def test_links_to_checkpoints_elsewhere_are_never_deleted(tmp_path):
    saved(tmp_path / "elsewhere", 1)
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "1")
    (tmp_path / "run" / "1").symlink_to(tmp_path / "elsewhere" / "1")
    after_save(tmp_path / "run", 2, 3, 4)
    assert (tmp_path / "elsewhere" / "1" / COMMITTED).exists() and (tmp_path / "run" / "1").exists()


@pytest.mark.parametrize(
    ("names", "removed"),
    [
        ((), True),
        (("state.orbax-checkpoint-tmp",), True),
        (("state", "meta"), True),
        (("notes.txt",), False),
        (("state", "commit_success.txt"), False),
    ],
)
def test_what_a_failed_save_leaves_is_deleted_and_nothing_else(names, removed, tmp_path):
    (tmp_path / "20").mkdir()
    for name in names:
        (tmp_path / "20" / name).mkdir()
    step_directories.delete_incomplete(tmp_path)
    assert (tmp_path / "20").exists() is not removed
