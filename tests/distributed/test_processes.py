"""What one process of several does: rows and devices, missing peers, refusals; with one process, nothing waits.

tests/reliability starts several real processes.
"""

import os
import socket
import threading

import jax
import numpy as np
import pytest
from conftest import small
from test_rendezvous import free_port

from t5like.distributed import processes, shared_file_systems, watchdog
from t5like.distributed.launchers import ProcessInfo
from t5like.distributed.liveness import Liveness
from t5like.distributed.messages import Connection
from t5like.distributed.process_group import process_group
from t5like.errors import CheckpointError
from t5like.sharding import mesh as meshes
from t5like.sharding import placement
from t5like.types import Batch


def test_a_process_whose_files_were_removed_reports_the_first_failure(monkeypatch, capsys):
    class Left(BaseException):
        pass

    def leave(code):
        raise Left(code)

    here, there = (Connection(end) for end in socket.socketpair())
    callbacks = {"on_end": lambda end: None, "vote": lambda: 0, "on_agreed": lambda point: None}
    connected = Liveness(1, {0: here}, {0: "node0"}, 60, **callbacks)
    there.send(end=[4, "process 0: full"])
    monkeypatch.setattr(processes, "_current", processes.Process(ProcessInfo("a test", "localhost:1", 2, 1), connected))
    monkeypatch.setattr(watchdog, "_ending", threading.Lock())
    monkeypatch.setattr(watchdog, "RECEIVE_SECONDS", 0.5)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Left) as ended:
        watchdog.fail(CheckpointError("checkpoints/6 could not be written: No such file"), debug=False)
    assert ended.value.args == (4,) and capsys.readouterr().err == "t5like: process 0: full\n"
    connected.close()


def test_the_rows_of_all_devices_are_each_batch_once(rng):
    config = small(mesh={"data": 2, "fsdp": 2, "tensor": 2})
    mesh = meshes.make_mesh(config)
    np.testing.assert_array_equal(placement.local_rows(mesh, 8), np.arange(8))
    batch = rng.integers(0, 9, (8, 4))
    shuffled = jax.sharding.Mesh(rng.permutation(mesh.devices.ravel()).reshape(mesh.devices.shape), mesh.axis_names)
    placed = placement.to_global(Batch(None, batch, batch.astype(np.float32)), shuffled, 8)
    np.testing.assert_array_equal(placed.targets_BL, batch)


def test_a_process_without_peers_reports_the_missing_ones(flags, command, tmp_path):
    alone = [f"--coordinator=localhost:{free_port()}", "--num_processes=3", "--config.train.process_timeout_seconds=1"]
    code, _, err = command("train", *flags, f"--workdir={tmp_path}/run", *alone, "--process_id=0")
    assert code == 76 and "waited 1 s for processes 1, 2 of 3 to start" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_commands_for_one_process_are_refused_where_a_launcher_started_several(command, monkeypatch, tmp_path):
    for name, value in (("COORDINATOR", "localhost:1"), ("NUM_PROCESSES", "2"), ("PROCESS_ID", "0")):
        monkeypatch.setenv(f"T5LIKE_{name}", value)
    code, _, err = command("generate", f"--workdir={tmp_path}", "--prompt=x")
    assert code == 2 and "generate is for one process, and explicit addresses started 2" in err


def test_with_one_process_collectives_return_at_once(tmp_path):
    assert processes.all_gather("a name", "x") == ["x"] and processes.broadcast("a name", "y") == "y"
    assert (
        processes.is_primary()
        and not processes.is_multi_process()
        and shared_file_systems.sharers("a name", tmp_path) == [0]
    )
    with watchdog.watchdog("a phase", 3), process_group(None, small(), {}):
        processes.barrier("a name")
        shared_file_systems.check_shared(tmp_path)
