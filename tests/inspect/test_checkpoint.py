"""`t5like inspect checkpoint` lists what is there, finds damage, and changes nothing."""

import shutil

import pytest
from conftest import contents

from t5like.checkpoint.step_directories import COMMITTED


@pytest.fixture
def workdir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def damage(workdir, step: int) -> None:
    for path in (workdir / "checkpoints" / str(step) / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_the_checkpoints_of_a_run_are_listed_without_reading_their_arrays(workdir, command):
    damage(workdir, 2)  # its metadata are good
    code, out, err = command("inspect", "checkpoint", f"--workdir={workdir}")
    assert (code, err) == (0, "")
    header, *rows = out.splitlines()
    assert header.split() == ["step", "size", "saved", "state"]
    assert [row.split()[0] for row in rows] == ["1", "2"]
    assert all("MB" in row or "kB" in row for row in rows) and "complete, its arrays were not read" in rows[0]


def test_verify_finds_damage_ends_with_4_and_changes_nothing(workdir, command):
    code, out, _ = command("inspect", "checkpoint", f"--workdir={workdir}", "--verify")
    assert code == 0 and [row.split()[-1] for row in out.splitlines()[1:]] == ["good", "good"]
    damage(workdir, 2)
    before = contents(workdir)
    code, out, err = command("inspect", "checkpoint", f"--workdir={workdir}", "--verify")
    assert code == 4 and err.count("\n") == 1 and "has damaged checkpoints: 2; good: 1" in err
    good, bad = out.splitlines()[1:]
    assert good.endswith("good") and "is damaged: what was read is not what was saved in" in bad
    assert contents(workdir) == before


def test_incomplete_and_renamed_checkpoints_are_listed_but_are_no_error(workdir, command):
    (workdir / "checkpoints" / "2" / COMMITTED).unlink()
    shutil.copytree(workdir / "checkpoints" / "1", workdir / "checkpoints" / "7.damaged-20260101T000000Z")
    code, out, _ = command("inspect", "checkpoint", f"--workdir={workdir}", "--verify")
    assert code == 0
    assert "incomplete: a save or a deletion was interrupted" in out.splitlines()[2]
    assert "set aside as 7.damaged-20260101T000000Z" in out.splitlines()[3]


def test_a_directory_without_a_run_and_an_unknown_subject_are_refused(tmp_path, refused):
    assert refused("inspect", "checkpoint", f"--workdir={tmp_path}")[0] == 4
    code, message = refused("inspect", "weather", f"--workdir={tmp_path}")
    assert code == 2 and "weather" in message
    assert refused("inspect")[0] == 2
