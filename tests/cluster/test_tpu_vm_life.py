"""The life of a job on TPU VMs, from the request to the deletion, with a stand-in for gcloud: see that module."""

import signal

import pytest
from gcloud_stand_in import calls, ended, local_job, make_cloud, render, start, starts, wait_for

from launch import tpu_vm
from launch.job import JobSpec, SweepRun
from launch.record import Record
from t5like.errors import ConfigError


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """The folder that plays Google Cloud."""
    return make_cloud(tmp_path, monkeypatch)


def test_preempted_machines_are_created_again_and_do_not_count_as_retries(cloud):
    (cloud / "states").write_text("SUSPENDED\n")  # the first request, while it waits
    code, output = ended(start(cloud, local_job(cloud, "preempted", 0, retries=0)))
    assert (code, starts(cloud)) == (0, 2), output
    assert [len(calls(cloud, action)) for action in ("create", "delete")] == [3, 3]


def test_failures_that_would_repeat_are_never_started_again(cloud):
    codes = (2, 3, 4, 5, 70, 1, 127)
    runs = tuple(SweepRun(str(code), ()) for code in codes)
    code, output = ended(start(cloud, local_job(cloud, *codes, runs=runs)))
    assert (code, starts(cloud)) == (2, len(codes)), output
    assert [f"/{code} ended with exit code {code}, and would again" in output for code in codes] == 7 * [True]
    assert len(calls(cloud, "delete")) == 1


@pytest.mark.parametrize(
    ("plan", "retries", "code"),
    [
        ((76, "saved", 137, "saved", "saved", 0), 2, 0),  # preemptions with progress do not count
        ((76, 137), 1, 76),
        ((75, 75, 75), 10, 76),  # no new checkpoint in three starts
    ],
)
def test_lost_processes_are_started_again_while_retries_or_progress_last(cloud, plan, retries, code):
    result, output = ended(start(cloud, local_job(cloud, *plan, retries=retries)))
    assert (result, starts(cloud)) == (code, len(plan)), output
    assert not (cloud / "state").exists()


def test_the_failure_of_one_worker_counts_more_than_the_loss_that_the_others_report(cloud):
    (cloud / "workers").write_text("2")
    code, output = ended(start(cloud, local_job(cloud, 76, 3)))
    assert (code, starts(cloud)) == (3, 2), output


def test_ctrl_c_stops_the_run_which_saves_and_deletes_the_machines(cloud):
    process = start(cloud, local_job(cloud, "wait"))
    wait_for(cloud / "waiting")
    process.send_signal(signal.SIGINT)
    code, output = ended(process)
    assert code == 130, output
    assert (cloud / "runs/mine/checkpoints/7").exists()
    assert not (cloud / "state").exists()


def test_a_run_saves_at_the_time_limit(cloud):
    code, output = ended(start(cloud, local_job(cloud, "wait", time_limit=1)))
    assert code == 75 and "the time limit of 1 seconds is over" in output, output
    assert (cloud / "runs/mine/checkpoints/7").exists()
    assert not (cloud / "state").exists()


def test_a_lost_supervisor_can_be_replaced_without_a_new_start(cloud):
    process = start(cloud, job := local_job(cloud, "wait"))
    wait_for(cloud / "waiting")
    process.kill()
    process.wait()
    process = start(cloud, job, "attach")
    (cloud / "go").touch()
    code, output = ended(process)
    assert (code, starts(cloud), len(calls(cloud, "create"))) == (0, 1, 1), output
    assert not (cloud / "state").exists()


def test_machines_that_another_command_deletes_are_not_created_again(cloud):
    process = start(cloud, local_job(cloud, "wait"))
    wait_for(cloud / "waiting")
    (cloud / "state").unlink()
    (cloud / "go").touch()
    code, output = ended(process)
    assert (code, len(calls(cloud, "create"))) == (143, 1), output


def record_of(job: JobSpec) -> Record:
    return Record("tpu_vm", f"{job.zone}/{job.name}", job.name, job.workdir)


def test_a_submitted_job_is_supervised_without_the_command_that_submitted_it_until_it_is_cancelled(cloud, capfd):
    job = local_job(cloud, "wait")
    submission = tpu_vm.submit(job, render(job))
    assert submission.id == "us-east5-b/mine"
    wait_for(cloud / "waiting")
    record = record_of(job)
    assert "ACTIVE; supervised by process" in tpu_vm.status(record)
    with pytest.raises(ConfigError, match="is a job that process .* supervises"):
        tpu_vm.submit(job, render(job))
    tpu_vm.cancel(record)
    assert (cloud / "runs/mine/checkpoints/7").exists()
    assert "no TPU VMs: done, cancelled or never created" in tpu_vm.status(record)
    assert tpu_vm.logs(record, follow=True) == 143  # the exit code of the job, after its log
    assert "training: wait" in capfd.readouterr().out
