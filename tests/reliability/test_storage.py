"""A disk that fills up, and two trainers on one directory."""

import contextlib
import re
import subprocess

import pytest
from runs import (
    Trainer,
    assert_equal_runs,
    assert_restorable,
    checkpoints,
    last_step,
    run_to_end,
    smallest,
    start_processes,
    step_directories,
    wait_for_end,
)


@pytest.fixture
def disk(tmp_path):
    """A file system of 12 MB in memory, as root can mount it."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", path], capture_output=True, text=True)
    assert mounted.returncode == 0, f"a tmpfs can't be mounted here: {mounted.stderr}"
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def fill(disk, leave: int) -> None:
    """Write a file that leaves about so many bytes free."""
    with (disk / "filler").open("ab", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        file.truncate(max(file.tell() - leave, 0))


@pytest.mark.parametrize("leave", [0, pytest.param(50_000, marks=pytest.mark.long)])
def test_a_full_disk_ends_a_run_with_4_and_it_continues_exactly_when_there_is_space(
    leave, disk, straight, flags, tmp_path
):
    workdir = disk / "run"
    with Trainer(smallest(flags, workdir), tmp_path / "log-0") as trainer:
        trainer.wait_for(lambda: len(checkpoints(workdir).steps()) >= 2 and last_step(workdir) >= 11)
        fill(disk, leave)
        code = trainer.end(60)
    assert code == 4, (code, trainer.err)
    line = trainer.err.splitlines()[-1]
    assert line.startswith("t5like: ") and str(workdir) in line and "No space left" in line, trainer.err
    assert "Traceback" not in trainer.err
    assert assert_restorable(workdir) >= 10
    complete = {str(step) for step in checkpoints(workdir).steps()}
    left = {path.name for path in step_directories(workdir)} - complete
    assert not left, "leftovers of a failed save fill the disk"
    (disk / "filler").unlink()
    run_to_end(smallest(flags, workdir), tmp_path / "log-1")
    assert_equal_runs(workdir, straight)


@pytest.mark.long
def test_two_processes_save_again_or_go_on_together_when_one_of_them_could_not_write(flags, tmp_path):
    workdir = tmp_path / "run"
    values = {"mesh__fsdp": 2, "train__num_steps": 25, "train__on_failed_save": "continue"}
    hooks = {1: ("--step=5", "--failures=1"), 0: ("--step=12", "--failures=2")}  # a save is tried twice on a full disk
    both = start_processes(2, smallest(flags, workdir, **values), tmp_path / "log", hooks)
    assert wait_for_end(both, 100) == [0, 0], both[0].err
    lines = [line for line in both[0].err.splitlines() if line.startswith("t5like: process")]
    expected = (  # a failure is known at the next save, which then has the newer state
        (1, 5, "saving again in 0.5 s"),
        (0, 15, "saving again in 0.5 s"),
        (0, 20, "training continues, the next checkpoint is tried in any case"),
    )
    for line, (rank, step, end) in zip(lines, expected, strict=True):
        assert line.startswith(f"t5like: process {rank}: {workdir}/checkpoints/{step} could not be written: "), line
        assert "File too large" in line and line.endswith(end), line
    assert checkpoints(workdir).steps() == [10, 25] and assert_restorable(workdir) == 25
    assert {path.name for path in step_directories(workdir)} == {"10", "25"}


@pytest.mark.long
def test_a_second_trainer_on_a_directory_is_refused_and_the_first_goes_on(straight, flags, tmp_path):
    workdir = tmp_path / "run"
    with Trainer(smallest(flags, workdir), tmp_path / "log-0") as first:
        first.wait_for(lambda: last_step(workdir) >= 1)
        with Trainer(smallest(flags, workdir), tmp_path / "log-1") as second:
            code = second.end(60)
            assert first.running(), "it ended before the second one started; more steps are needed"
        assert code in (2, 4) and re.search(r"t5like: --workdir=.* is in use", second.err), second.err
        assert first.end() == 0, first.err
    assert_equal_runs(workdir, straight)
