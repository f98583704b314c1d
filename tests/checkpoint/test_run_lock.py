"""The lock of a run directory: one process writes it, and a dead one's lock is free, also without flock."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import contents

from t5like.checkpoint import run_lock
from t5like.errors import CheckpointError

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from t5like.checkpoint import run_lock
run_lock.lock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Seconds of the module, divided by 100."""
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 0.3)
    monkeypatch.setattr(run_lock, "FIRST_LOOKS", ())
    with run_lock.released():
        yield


@pytest.fixture
def no_locks(monkeypatch):
    """A network file system without locks."""

    def flock(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


def write_entry(run: Path, **changes) -> None:
    (run / run_lock.FILE).write_text(json.dumps({**run_lock._entry(), **changes}))


def test_a_second_process_is_refused_and_told_who_writes(trained, flags, command, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = contents(run)
    with subprocess.Popen([sys.executable, "-c", HOLDER, run], cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        code, _, err = command("train", *flags, f"--workdir={run}", "--config.train.num_steps=3")
        entry = json.loads((run / run_lock.FILE).read_text())
        who = f"process {holder.pid} on {entry['host']}, started {entry['started']}"
        assert (code, err.count("\n")) == (4, 1) and err.startswith(f"t5like: --workdir={run} is in use by {who}; wait")
        assert {**contents(run), run_lock.FILE: before[run_lock.FILE]} == before
        holder.kill()  # which leaves its entry, and no lock
    run_lock.lock(run)
    run_lock.lock(run)  # its own
    assert json.loads((run / run_lock.FILE).read_text())["process_id"] == os.getpid()
    with pytest.raises(BlockingIOError), (run / run_lock.FILE).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with run_lock.released():
        pass
    assert (run / run_lock.FILE).read_bytes() == b""
    with (run / run_lock.FILE).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(CheckpointError, match="is in use by another process; wait"):
            run_lock.lock(run)


def test_a_file_system_without_locks_recognizes_a_process_of_this_system(tmp_path, no_locks):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    write_entry(tmp_path, process_id=child.pid, started_ticks=run_lock._start_ticks(child.pid))
    with pytest.raises(CheckpointError, match=f"is in use by process {child.pid} on "):
        run_lock.lock(tmp_path)
    write_entry(tmp_path, process_id=child.pid, started_ticks=1)  # the number was given to another process
    run_lock.lock(tmp_path)
    child.communicate(b"\n")


def test_an_entry_of_another_host_is_stale_when_it_is_no_longer_touched(tmp_path):
    write_entry(tmp_path, host="node7", machine="node7")
    stop = threading.Event()

    def touch():
        while not stop.wait(run_lock.BEAT_SECONDS):
            os.utime(tmp_path / run_lock.FILE)

    living = threading.Thread(target=touch)
    living.start()
    with pytest.raises(CheckpointError, match=r"is in use by process \d+ on node7, started 20"):
        run_lock.lock(tmp_path)
    stop.set()
    living.join()
    begun = time.monotonic()
    run_lock.lock(tmp_path)
    assert time.monotonic() - begun > run_lock.STALE_SECONDS / 2
    assert json.loads((tmp_path / run_lock.FILE).read_text())["host"] != "node7"


def test_the_owner_touches_the_file(tmp_path):
    run_lock.lock(tmp_path)
    os.utime(tmp_path / run_lock.FILE, (1, 1))
    deadline = time.monotonic() + 5
    while os.stat(tmp_path / run_lock.FILE).st_mtime < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_of_two_that_start_at_the_same_moment_without_locks_the_overwritten_one_ends(tmp_path, no_locks):
    messages = []
    run_lock.lock(tmp_path, messages.append)
    write_entry(tmp_path, host="node7", process_id=7)  # the other one found no entry either
    deadline = time.monotonic() + 5
    while not messages:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert f"--workdir={tmp_path} is in use by process 7 on node7, started " in messages[0]
    with run_lock.released():
        pass
    assert json.loads((tmp_path / run_lock.FILE).read_text())["host"] == "node7"  # it keeps its lock


def test_a_damaged_lock_file_is_no_lock(tmp_path):
    for content in (b"\x00\xff", b"[" * 10_000, b"{}", b"[1]", b'{"host": 1, "process_id": "x"}'):
        (tmp_path / run_lock.FILE).write_bytes(content)
        with run_lock.released():
            run_lock.lock(tmp_path)
