"""Manifests of Kubernetes: golden files, published schemas, hostile values, exit codes, ranks of the processes."""

import dataclasses
import json
import re

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kubernetes_api_server import SCHEMA
from kubernetes_jobs import CPU, GOLDEN, JOBS

from launch import jobset, kubernetes
from launch.job import JobSpec, Mount, Secret, SweepRun, run_directory, t5like_command
from t5like.errors import ConfigError

OLDEST, NEWEST = "1.31", "1.37"  # podFailurePolicy is stable since 1.31
SECRET_VALUE = "s3cr3t"


def documents(job: JobSpec) -> list[dict]:
    return list(yaml.load_all(kubernetes.render(job), yaml.CSafeLoader))


def template(job: JobSpec, run: int = 0) -> dict:
    """The Job's specification."""
    return documents(job)[run]["spec"]["replicatedJobs"][0]["template"]["spec"]


def container(job: JobSpec, run: int = 0) -> dict:
    [only] = template(job, run)["template"]["spec"]["containers"]
    return only


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", JOBS)
def test_the_manifest_is_the_golden_file(name):
    assert kubernetes.render(JOBS[name]) == (GOLDEN / f"{name}.yaml").read_text("utf-8")


def test_every_golden_file_belongs_to_a_job():
    assert {path.stem for path in GOLDEN.glob("*.yaml")} == set(JOBS)


@pytest.mark.parametrize("name", JOBS)
def test_the_published_schemas_accept_the_manifest(name):
    for document in yaml.safe_load_all((GOLDEN / f"{name}.yaml").read_text("utf-8")):
        jsonschema.Draft202012Validator(SCHEMA).validate(document)
        for replicated in document["spec"]["replicatedJobs"]:
            # A JobSet's metadata is that of every object, and its template that of a Job.
            job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": document["metadata"], **replicated["template"]}
            for version in (OLDEST, NEWEST):
                kubernetes_validate.validate(job, version, strict=True)


def test_the_schema_refuses_an_unknown_field_and_an_unknown_action():
    [good] = documents(CPU)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    misspelt, unknown = json.loads(json.dumps(good)), json.loads(json.dumps(good))
    misspelt["spec"]["failurePolicy"]["maxRestart"] = 1
    unknown["spec"]["failurePolicy"]["rules"][0]["action"] = "Restart"
    assert validator.is_valid(good)
    assert not validator.is_valid(misspelt)
    assert not validator.is_valid(unknown)


def test_two_slices_of_v5e_256_are_two_jobs_of_64_hosts_with_four_chips_each():
    [document] = documents(JOBS["two_slices_of_v5e-256"])
    [replicated] = document["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    pod = spec["template"]["spec"]
    assert replicated["replicas"] == 2
    assert spec["parallelism"] == spec["completions"] == 64
    assert pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == 4
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
        "cloud.google.com/gke-spot": "true",
    }
    placement = document["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert placement == "cloud.google.com/gke-nodepool"


def test_slices_use_the_hosts_network_unless_a_bucket_is_mounted():
    job = JOBS["two_slices_of_v5e-256"]
    spec = template(job)["template"]["spec"]
    assert (spec["hostNetwork"], spec["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    with_bucket = dataclasses.replace(job, mounts=(*job.mounts, Mount("gs://lab-data", "/data")))
    assert "hostNetwork" not in template(with_bucket)["template"]["spec"]
    assert "hostNetwork" not in template(dataclasses.replace(job, slices=1))["template"]["spec"]


def test_v5p_512_is_256_chips_on_64_hosts():
    spec = template(JOBS["v5p-512"])
    chips = spec["template"]["spec"]["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert (spec["completions"], spec["completions"] * chips) == (64, 256)


def test_each_h100_node_is_one_pod_with_eight_gpus_and_one_process():
    spec = template(JOBS["8_nodes_of_h100"])
    [main] = spec["template"]["spec"]["containers"]
    assert spec["completions"] == 8
    assert main["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert {"name": "T5LIKE_NUM_PROCESSES", "value": "8"} in main["env"]


def test_only_a_job_with_a_queue_is_suspended_until_kueue_admits_it():
    queued, unqueued = documents(JOBS["two_slices_of_v5e-256"])[0], documents(CPU)[0]
    assert queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert queued["spec"]["suspend"] is True
    assert "suspend" not in unqueued["spec"]
    assert "kueue.x-k8s.io/queue-name" not in unqueued["metadata"]["labels"]


def test_each_run_of_a_sweep_is_a_jobset_of_its_own_with_the_jobs_label():
    job = JOBS["sweep"]
    found = documents(job)
    assert [document["metadata"]["name"] for document in found] == ["rates-0", "rates-1"]
    assert {document["metadata"]["labels"]["app.kubernetes.io/instance"] for document in found} == {"rates"}
    for index, run in enumerate(job.runs):
        assert container(job, index)["command"] == t5like_command(job, run)
        assert {"name": "T5LIKE_COORDINATOR", "value": f"rates-{index}-hosts-0-0.rates-{index}:8476"} in container(
            job, index
        )["env"]


def test_only_tpu_containers_run_as_root_and_none_is_privileged():
    for name, job in JOBS.items():
        spec = template(job)["template"]["spec"]
        user, limits = spec["securityContext"], spec["containers"][0]["securityContext"]
        assert (user["runAsUser"] == 0) == (job.platform == "tpu"), name
        assert job.platform == "tpu" or user["runAsNonRoot"] is True, name
        assert limits["allowPrivilegeEscalation"] is False
        assert limits["capabilities"]["drop"] == ["ALL"]
        assert "privileged" not in limits


def test_a_secret_is_a_reference_and_its_value_is_not_read(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET_VALUE)
    job = dataclasses.replace(CPU, secrets=(Secret("WANDB_API_KEY", "wandb/api-key"),))
    reference = {"secretKeyRef": {"name": "wandb", "key": "api-key"}}
    assert {"name": "WANDB_API_KEY", "valueFrom": reference} in container(job)["env"]
    assert SECRET_VALUE not in kubernetes.render(job)


def test_a_bucket_is_a_volume_of_the_csi_driver_that_the_pods_user_owns():
    job = dataclasses.replace(CPU, mounts=(*CPU.mounts, Mount("gs://lab-data/stores/en", "/data", read_only=True)))
    pod = template(job)["template"]
    assert pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert pod["spec"]["volumes"][-1] == {
        "name": "mount-1",
        "csi": {
            "driver": "gcsfuse.csi.storage.gke.io",
            "readOnly": True,
            "volumeAttributes": {
                "bucketName": "lab-data",
                "mountOptions": "implicit-dirs,rename-dir-limit=1000000,uid=1000,gid=1000,only-dir=stores/en",
            },
        },
    }
    assert container(job)["volumeMounts"][-1] == {"name": "mount-1", "mountPath": "/data", "readOnly": True}


# --- hostile values ---------------------------------------------------------------------------------------------------

HOSTILE = (
    "'", '"', "it's \"x\"", "$(id)", "$(HOME)", "$$", "$$(HOME)", "$$$(HOME)", "$", "a$", "$(", "${HOME}", "$é", "`id`",
    ";", "; id", "#SBATCH --wrap=id", "# x", "-x", "--", "{{", "{{ .Values.x }}", "}}", "{a: b}", "[a", "- a", "? a",
    "a: b", "a:", ": a", "&a", "*a", "!!python/object:os.system", "!a", "%TAG", "@a", "|", ">", "\\", "\\n", "\\x41",
    "1e3", "0o17", "017", "0x1f", "1_000", "1:30", ".inf", ".nan", "~", "null", "y", "n", "on", "Yes", "true", "=",
    "<<", "2026-11-28", "", " ", " a", "a ", "é", "日本", "\u200b", "\ufeff", "\U0001f600", "x" * 300,
    "a\nb", "a\r\nb", "\r", "a\u2028b", "a\u2029b", "\x85", "\x00", "\x1b[31m", "\ud800",
)  # fmt: skip
VARIABLES = {"HOME": "/root", "id": "no"}


def expand(text: str) -> str:
    """What Kubernetes makes of a command's part: third_party/forked/golang/expansion/expand.go, on bytes."""
    data, result, cursor = text.encode(), b"", 0
    while cursor < len(data):
        char, rest = data[cursor : cursor + 1], data[cursor + 1 :]
        if char != b"$" or not rest:
            result, cursor = result + char, cursor + 1
        elif rest[:1] == b"$":
            result, cursor = result + b"$", cursor + 2
        elif rest[:1] == b"(" and (end := rest.find(b")")) > 0:
            name = rest[1:end].decode()
            result, cursor = result + VARIABLES.get(name, f"$({name})").encode(), cursor + end + 2
        else:  # Go's string(byte) is the character with that number
            result, cursor = result + b"$" + chr(rest[0]).encode(), cursor + 2
    return result.decode()


def changes(value: str) -> dict[str, dict]:
    """Changes of a job that put the value into one place each."""
    return {
        "env": {"env": (("NAME", value),)},
        "command": {"command": ("train", f"--config.data.source={value}", value)},
        "override": {"runs": (SweepRun("a", (f"--config.data.source={value}", value)),)},
        "setup": {"setup": (value,)},
        "directory": {"directory": f"/{value}"},
        "compile_cache": {"compile_cache": f"/runs/{value}"},
        "python": {"python": value},
        "workdir": {"workdir": f"/runs/{value}"},
    }


def refused(job: JobSpec) -> bool:
    try:
        kubernetes.check(job)
    except ConfigError as error:
        assert "\n" not in str(error) and "\r" not in str(error)
        return True
    return False


@pytest.mark.parametrize("value", HOSTILE, ids=ascii)
def test_a_hostile_value_arrives_byte_for_byte_or_is_refused_in_one_line(value):
    accepted = {}
    for change in changes(value).values():
        if not refused(dataclasses.replace(CPU, **change)):
            accepted |= change
    job = dataclasses.replace(CPU, **accepted)
    main = container(job)
    command = [expand(part) for part in main["command"]]
    if job.setup:
        assert command[:4] == ["/bin/bash", "-ec", f'{value}\nexec "$@"', "bash"]
        command = command[4:]
    assert command == t5like_command(job, *job.runs)
    env = {entry["name"]: expand(entry["value"]) for entry in main["env"]}
    assert {name: env[name] for name, _ in job.env} == dict(job.env)
    assert main.get("workingDir", "") == job.directory
    assert env["JAX_COMPILATION_CACHE_DIR"] == job.compile_cache
    assert documents(job)[0]["metadata"]["annotations"]["t5like/workdir"] == run_directory(job, *job.runs)
    assert bool(accepted) == value.isprintable() or value in ("\u200b", "\ufeff")


@pytest.mark.parametrize("value", HOSTILE, ids=ascii)
def test_a_hostile_name_is_refused_or_arrives(value):
    jobs = {
        "name": dataclasses.replace(CPU, name=value),
        "namespace": dataclasses.replace(CPU, namespace=value),
        "queue": dataclasses.replace(CPU, queue=value),
        "service_account": dataclasses.replace(CPU, service_account=value),
        "priority": dataclasses.replace(CPU, priority=value),
        "image": dataclasses.replace(CPU, image=value),
        "selector key": dataclasses.replace(CPU, node_selector=((value, "a"),)),
        "selector value": dataclasses.replace(CPU, node_selector=(("a", value),)),
        "secret": dataclasses.replace(CPU, secrets=(Secret("A", value),)),
        "secret name": dataclasses.replace(CPU, secrets=(Secret(value, "a/b"),)),
        "env name": dataclasses.replace(CPU, env=((value, "a"),)),
        "mount": dataclasses.replace(CPU, mounts=(*CPU.mounts, Mount(value, "/a"))),
        "bucket": dataclasses.replace(CPU, mounts=(*CPU.mounts, Mount(f"gs://{value}", "/a"))),
        "claim": dataclasses.replace(CPU, mounts=(*CPU.mounts, Mount(f"pvc:{value}", "/a"))),
    }
    accepted = {field: job for field, job in jobs.items() if not refused(job)}
    for field, job in accepted.items():
        assert value in kubernetes.render(job), field
    if not re.fullmatch(r"[A-Za-z0-9._-]*", value):
        assert set(accepted) <= {"image"} and (not accepted or value == "1:30")
    if value == "":
        assert set(accepted) == {"namespace", "queue", "service_account", "priority", "selector value"}


@pytest.mark.parametrize("value", [text for text in HOSTILE if text.isprintable()], ids=ascii)
def test_texts_are_quoted_that_parsers_of_yaml_1_1_and_1_2_read_differently(value):
    """Go's parsers, which kubectl uses, read 1e3 and y differently from PyYAML."""
    for token in yaml.scan(jobset.dump([{"env": [value]}])):
        if isinstance(token, yaml.ScalarToken) and token.value == value:
            assert not token.plain or re.fullmatch(r"[A-Za-z][A-Za-z0-9/._-]{2,}", value)
