"""What is refused before a submission; and submission, status, logs and cancel against an API server."""

import dataclasses
import subprocess
import sys

import pytest
from kubernetes_api_server import ACCOUNTS, CLAIMS, JOBSETS, PODS, PRIORITIES, QUEUES, WORKLOADS, ApiServer, terminated
from kubernetes_jobs import CPU, JOBS

from launch import kubernetes, pods
from launch.job import JobSpec, Mount, Secret
from launch.main import launch
from launch.record import Record
from t5like.errors import ConfigError

ARGUMENTS = ("kubernetes", "--skip_plan", "--image=registry.example/t5like:1.0", "--mount=pvc:runs:/runs")
COMMAND = ("--", "train", "--config=tiny", "--workdir=/runs/tiny")
RECORD = Record("kubernetes", "research/tiny")


@pytest.fixture
def server(tmp_path, monkeypatch):
    running = ApiServer()
    running.write_kubeconfig(tmp_path / "kubeconfig")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(pods, "POLL_SECONDS", 0.02)
    running.add(CLAIMS, "runs", spec={"accessModes": ["ReadWriteMany"]})
    yield running
    running.close()


def submit(job: JobSpec = CPU):
    kubernetes.check(job)
    return kubernetes.submit(job, kubernetes.render(job))


def refusal(call, *arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED = {
    "--image= must be an image of a registry with a tag": {"image": ""},
    "--image=r.example/t5 must be an image": {"image": "r.example/t5"},
    "--image=r.example:5000/t5 must be an image": {"image": "r.example:5000/t5"},
    "--image=/images/t5.sif must be an image of a registry": {"image": "/images/t5.sif"},
    "may be another image after a restart": {"image": "r.example/t5:latest"},
    "--processes_per_node=8 must be 1 on Kubernetes: JAX drives all GPUs": {
        "accelerator": "h100:1x8",
        "processes_per_node": 8,
    },
    "--slices=2 is for TPUs": {"slices": 2},
    "--slices=2 needs slices of several hosts": {"accelerator": "v5e:2x4", "slices": 2},
    "--nodes=3 differs from --accelerator=v5e:4x4, which has 4 hosts": {"accelerator": "v5e:4x4", "nodes": 3},
    "use at most 39 characters": {"name": "a" * 40, "nodes": 10**9},
    "--mount=s3://bucket:/data can't be mounted by its name": {"mounts": (*CPU.mounts, Mount("s3://bucket", "/data"))},
    "use --mount=gs://runs/New:/data": {"mounts": (*CPU.mounts, Mount("gs://RUNS/New", "/data"))},
    "use --mount=pvc:claim:/data, or gs": {"mounts": (*CPU.mounts, Mount("pvc:CLAIM", "/data"))},
    "--mount=/home:/home": {"mounts": (*CPU.mounts, Mount("/home", "/home"))},
    "must have an absolute path": {"mounts": (*CPU.mounts, Mount("pvc:a", "a"))},
    "--mount has the path /runs twice": {"mounts": (*CPU.mounts, Mount("pvc:a", "/runs/"))},
    "--mount has the path /dev/shm twice": {"mounts": (*CPU.mounts, Mount("pvc:a", "/dev/shm"))},
    "--workdir=/runs/tiny is inside the container": {"mounts": ()},
    "--workdir=gs://runs/tiny must be a path in the pod": {"workdir": "gs://runs/tiny"},
    "--workdir=/runs/tiny is below the mount /runs, which is read-only": {"mounts": (Mount("pvc:a", "/runs", True),)},
    "--secret=TOKEN": {"secrets": (Secret("TOKEN"),)},
    "--namespace": {"namespace": "Research"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_job_that_kubernetes_can_not_run_is_refused(message):
    assert message in refusal(kubernetes.check, dataclasses.replace(CPU, **REFUSED[message]))


def test_the_directory_next_to_a_mount_is_not_in_it():
    job = dataclasses.replace(CPU, workdir="/runs2/a", mounts=(Mount("pvc:runs", "/runs"),))
    assert "--workdir=/runs2/a is inside the container" in refusal(kubernetes.check, job)


@pytest.mark.parametrize("name", JOBS)
def test_the_jobs_of_the_golden_files_are_accepted(name):
    kubernetes.check(JOBS[name])


def test_without_the_package_a_manifest_is_rendered_and_a_submission_refused():
    code = (
        "import sys; sys.modules['kubernetes'] = None\n"
        "from launch.main import launch\n"
        "from t5like.errors import ConfigError\n"
        f"arguments, command = {[*ARGUMENTS]}, {[*COMMAND]}\n"
        "assert launch([*arguments, '--dry_run', *command]) == 0\n"
        "assert 'jax' not in sys.modules\n"
        "try: launch([*arguments, *command])\n"
        "except ConfigError as error: print('refused:', error)\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "kind: JobSet" in output
    assert output.splitlines()[-1].startswith("refused: the Python package kubernetes is needed")


# --- submission -------------------------------------------------------------------------------------------------------


def test_a_submission_creates_what_the_dry_run_prints(server, capsys):
    assert launch([*ARGUMENTS, "--dry_run", *COMMAND]) == 0
    printed = capsys.readouterr().out
    assert server.requests == []
    assert launch([*ARGUMENTS, *COMMAND]) == 0
    assert "kubernetes:research/tiny" in capsys.readouterr().out
    [document] = kubernetes.yaml.safe_load_all(printed)
    assert server.objects[f"{JOBSETS}/tiny"] == document


def test_the_record_finds_the_cluster_again(server):
    submission = submit()
    assert submission.id == "research/tiny"
    assert submission.details == {"namespace": "research", "context": "lab"}
    assert submission.lines["cancel"] == "t5like launch cancel kubernetes:research/tiny"


def test_unknown_fields_are_refused_by_the_server_instead_of_dropped(server):
    submit()
    created = [query for method, _, query in server.requests if method == "POST"]
    assert created == [{"dryRun": "All", "fieldValidation": "Strict"}, {"fieldValidation": "Strict"}]
    text = kubernetes.render(CPU).replace("maxRestarts", "maxRestart").replace("name: tiny", "name: tiny2")
    assert "JobSet in this cluster is too old" in refusal(kubernetes.submit, CPU, text)


def test_no_run_of_a_sweep_is_created_if_one_is_refused(server):
    server.add(QUEUES, "team-a")
    server.add(JOBSETS, "rates-1")
    assert "--name=rates is the name of a job" in refusal(submit, JOBS["sweep"])
    assert set(server.objects) & {f"{JOBSETS}/rates-0"} == set()
    del server.objects[f"{JOBSETS}/rates-1"]
    submit(JOBS["sweep"])
    assert {f"{JOBSETS}/rates-0", f"{JOBSETS}/rates-1"} <= set(server.objects)


def test_errors_of_the_cluster_are_one_line_and_nothing_is_submitted(server):
    server.served.discard(JOBSETS)
    assert "JobSet is not installed in this cluster" in refusal(submit)
    server.served.add(JOBSETS)
    server.forbidden.add(JOBSETS)
    assert 'the Kubernetes cluster forbids this: jobsets is forbidden: User "me"' in refusal(submit)
    server.forbidden.clear()
    other = dataclasses.replace(CPU, namespace="nowhere")
    assert refusal(submit, other).startswith("--namespace=nowhere does not exist in this cluster")
    assert f"{JOBSETS}/tiny" not in server.objects


def test_a_cluster_that_does_not_respond_is_one_line(server):
    server.close()
    assert f"the Kubernetes cluster at {server.address} does not respond" in refusal(submit)


def test_no_cluster_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "missing"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert "there is no Kubernetes cluster to submit to" in refusal(submit)


@pytest.mark.parametrize(
    ("change", "path", "name", "message"),
    [
        ({"queue": "team-b"}, QUEUES, "team-b", "--queue=team-b does not exist in namespace research; use team-a"),
        ({"mounts": (*CPU.mounts, Mount("pvc:b", "/b"))}, CLAIMS, "b", "--mount=pvc:b does not exist"),
        ({"service_account": "b"}, ACCOUNTS, "b", "--service_account=b does not exist"),
        ({"priority": "b"}, PRIORITIES, "b", "--priority=b is no priority class"),
    ],
)
def test_what_a_job_would_wait_for_is_looked_up(server, change, path, name, message):
    server.add(QUEUES, "team-a")
    job = dataclasses.replace(CPU, **change)
    assert message in refusal(submit, job)
    server.forbidden.add(path)  # what may not be read is not checked
    submit(job)
    server.forbidden.clear()
    server.objects.pop(f"{JOBSETS}/tiny")
    server.add(path, name, spec={"accessModes": ["ReadWriteMany"]})
    submit(job)


def test_a_queue_without_kueue_is_refused(server):
    server.served -= {QUEUES, WORKLOADS}
    message = "--queue=team-a: Kueue is not installed in this cluster"
    assert message in refusal(submit, dataclasses.replace(CPU, queue="team-a"))


def test_a_claim_for_one_host_is_refused_for_two(server):
    server.add(CLAIMS, "runs", spec={"accessModes": ["ReadWriteOnce"]})
    message = "--mount=pvc:runs has the access modes ReadWriteOnce and can't be mounted on 2 hosts"
    assert message in refusal(submit, dataclasses.replace(CPU, nodes=2))
    submit(CPU)


# --- status, logs, cancel ---------------------------------------------------------------------------------------------


def end(server: ApiServer, kind: str, message: str = "", name: str = "tiny") -> None:
    condition = {"type": kind, "status": "True", "reason": "x", "message": message}
    server.objects[f"{JOBSETS}/{name}"]["status"] = {"conditions": [condition], "restarts": 2}


def test_status_tells_why_a_pod_waits(server):
    submit(dataclasses.replace(CPU, nodes=2))
    waiting = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are free"}
    server.add_pod("tiny", 0, "Running")
    server.add_pod("tiny", 1, "Pending", conditions=[waiting])
    line = "tiny  1 of 2 hosts run; 1 not: Unschedulable: 0/3 nodes are free; restarts: 0, 0 of 10 counted"
    assert kubernetes.status(RECORD) == line


def test_status_tells_that_an_image_or_a_secret_is_missing(server):
    submit()
    state = {"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "wandb" not found'}}
    container = {"name": "main", "state": state, "image": "", "imageID": "", "ready": False, "restartCount": 0}
    server.add_pod("tiny", 0, "Pending", containerStatuses=[container])
    assert '1 not: CreateContainerConfigError: secret "wandb" not found' in kubernetes.status(RECORD)


def test_status_of_a_job_in_the_queue_has_kueues_reason(server):
    server.add(QUEUES, "team-a")
    submit(dataclasses.replace(CPU, queue="team-a"))
    server.objects[f"{JOBSETS}/tiny"]["metadata"]["uid"] = "1-2"
    condition = {"type": "QuotaReserved", "status": "False", "reason": "Pending", "message": "insufficient quota"}
    labels = {"kueue.x-k8s.io/job-uid": "1-2"}
    server.add(WORKLOADS, "jobset-tiny", metadata={"labels": labels}, status={"conditions": [condition]})
    assert kubernetes.status(RECORD).startswith("tiny  waits in the queue: insufficient quota; restarts")


def test_status_of_a_failed_job_has_its_exit_code_with_the_meaning(server):
    submit()
    server.add_pod("tiny", 0, "Failed", containerStatuses=terminated(76))
    server.add_pod("tiny", 1, "Failed", containerStatuses=terminated(2))
    end(server, "Failed", "jobset failed due to one or more job failures")
    line = "tiny  failed: exit code 2 (config or command line), jobset failed due to one or more job failures"
    assert kubernetes.status(RECORD) == f"{line}; restarts: 2, 0 of 10 counted"


def test_status_of_a_sweep_has_a_line_for_each_run(server):
    server.add(QUEUES, "team-a")
    submit(JOBS["sweep"])
    end(server, "Completed", name="rates-0")
    lines = kubernetes.status(Record("kubernetes", "research/rates")).splitlines()
    assert [line.split(";")[0] for line in lines] == ["rates-0  done", "rates-1  waits in the queue"]


def test_logs_have_the_number_of_the_process_if_there_are_several(server, capsys):
    submit(dataclasses.replace(CPU, nodes=2))
    server.add_pod("tiny", 1, "Running", "of one\n")
    server.add_pod("tiny", 0, "Running", "step 1\nstep 2\x1b[31m\n")
    assert kubernetes.logs(RECORD, follow=False) == 0
    assert capsys.readouterr().out.splitlines() == ["[0] step 1", "[0] step 2\\u001b[31m", "[1] of one"]


def test_following_prints_each_line_once_through_a_restart_and_returns_the_exit_code(server, capsys, monkeypatch):
    submit()
    first = server.add_pod("tiny", 0, "Running", "step 1\n")
    looks = []

    def change(seconds):
        looks.append(seconds)
        if len(looks) == 3:  # preempted: the pod is gone, another one starts
            server.objects.pop(f"{PODS}/{first['metadata']['name']}")
            server.add_pod("tiny", 0, "Pending", "step 2\nstep 3\n")
        if len(looks) == 6:
            [second] = [item for path, item in server.objects.items() if path.startswith(PODS)]
            second["status"] = {"phase": "Failed", "containerStatuses": terminated(5)}
        if len(looks) == 9:
            end(server, "Failed")
        kubernetes.pods.threading.Event().wait(0.02)

    monkeypatch.setattr(pods.time, "sleep", change)
    assert kubernetes.logs(RECORD, follow=True) == 5
    assert capsys.readouterr().out.splitlines() == ["step 1", "step 2", "step 3"]


def test_following_a_job_that_succeeds_returns_0(server, capsys):
    submit()
    server.add_pod("tiny", 0, "Succeeded", "done\n", containerStatuses=terminated(0))
    end(server, "Completed")
    assert kubernetes.logs(RECORD, follow=True) == 0
    assert capsys.readouterr().out == "done\n"


def test_cancel_deletes_all_runs_of_the_job_and_no_other(server):
    server.add(QUEUES, "team-a")
    submit(JOBS["sweep"])
    submit()
    kubernetes.cancel(Record("kubernetes", "research/rates", details={"context": "lab"}))
    assert [path for path in server.objects if path.startswith(JOBSETS)] == [f"{JOBSETS}/tiny"]


def test_a_job_that_does_not_exist_is_one_line(server):
    for call in (kubernetes.status, kubernetes.cancel):
        assert "there is no job gone in namespace research" in refusal(call, Record("kubernetes", "research/gone"))
    assert "must be kubernetes:NAMESPACE/NAME" in refusal(kubernetes.status, Record("kubernetes", "gone"))
