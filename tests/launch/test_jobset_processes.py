"""What happens to the pods of a JobSet: their ranks, and which exit codes start them again.

The rules of a manifest are evaluated as Kubernetes' Job controller (pkg/controller/job/pod_failure_policy.go) and
JobSet's controller (pkg/controllers/failure_policy.go) evaluate them.
"""

import dataclasses
import re
from typing import NamedTuple

import pytest
import yaml
from kubernetes_jobs import CPU, JOBS

from launch import kubernetes
from launch.job import RESTART_CODES, STOP_CODES, JobSpec
from t5like.distributed.launchers import ProcessInfo, detect_process


def jobset(job: JobSpec) -> dict:
    return yaml.load(kubernetes.render(job), yaml.CSafeLoader)


# --- restarts ---------------------------------------------------------------------------------------------------------


class Failure(NamedTuple):
    """Why a Job has failed."""

    reason: str
    message: str = ""


def fail_job(policy: dict, code: int | None, disrupted: bool) -> Failure:
    """The Job's failure after a pod has ended with a code other than 0, or without one because its host is lost."""
    for index, rule in enumerate(policy["rules"]):
        assert rule["action"] == "FailJob"
        if codes := rule.get("onExitCodes"):
            matches = code not in (None, 0) and (code in codes["values"]) == (codes["operator"] == "In")
            message = f"Container {codes['containerName']} for pod research/x failed with exit code {code}"
        else:
            matches = disrupted and {"type": "DisruptionTarget", "status": "True"} in rule["onPodConditions"]
            message = "Pod research/x has condition DisruptionTarget"
        if matches:
            return Failure("PodFailurePolicy", f"{message} matching FailJob rule at index {index}")
    return Failure("BackoffLimitExceeded", "Job has reached the specified backoff limit")


def action_for(policy: dict, failures: list[Failure]) -> str:
    """What the JobSet does about its failed Jobs: the first rule that matches one of them, or a restart."""
    for rule in policy["rules"]:
        for failure in failures:
            reasons, patterns = rule.get("onJobFailureReasons"), rule.get("onJobFailureMessagePatterns")
            if (not reasons or failure.reason in reasons) and (
                not patterns or any(re.search(pattern, failure.message) for pattern in patterns)
            ):
                return rule["action"]
    return "RestartJobSet"


class Outcome(NamedTuple):
    """How a job ended.

    Attributes:
        starts: how often it was started.
        done: whether it succeeded.
    """

    starts: int
    done: bool


def run(job: JobSpec, codes: list[int | None], *, disrupted: bool = False) -> Outcome:
    """Run a job whose pods end with these codes, one after each start; the last one is repeated, up to 1,000 times."""
    spec = jobset(job)["spec"]
    pod_policy = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]
    counted = 0
    for start in range(1000):
        code = codes[min(start, len(codes) - 1)]
        if code == 0:
            return Outcome(start + 1, True)
        action = action_for(spec["failurePolicy"], [fail_job(pod_policy, code, disrupted)])
        counted += action == "RestartJobSet"
        if action == "FailJobSet" or counted > spec["failurePolicy"]["maxRestarts"]:
            return Outcome(start + 1, False)
    return Outcome(1000, False)


@pytest.mark.parametrize("code", STOP_CODES)
def test_a_failure_that_would_repeat_is_never_started_again(code):
    assert run(CPU, [code, 0]) == Outcome(1, False)


@pytest.mark.parametrize("code", [*RESTART_CODES, 137, 143])
def test_a_preempted_a_lost_and_a_killed_process_start_again(code):
    assert run(CPU, [code, 0]) == Outcome(2, True)


@pytest.mark.parametrize("code", [1, 126, 127, 128, 134, 139, 255])
def test_a_code_that_t5like_does_not_return_stops_the_job(code):
    assert run(CPU, [code, 0]) == Outcome(1, False)


def test_success_ends_the_job():
    assert run(CPU, [0]) == Outcome(1, True)


def test_a_preemption_does_not_count_as_a_retry():
    assert run(dataclasses.replace(CPU, retries=0), [75, 75, 75, 0]) == Outcome(4, True)


@pytest.mark.parametrize("code", [76, 137, 143])
def test_losses_of_processes_end_the_job_after_the_retries(code):
    assert run(dataclasses.replace(CPU, retries=3), [code]) == Outcome(4, False)


def test_a_lost_host_counts_as_a_retry_except_on_spot_machines():
    job = dataclasses.replace(CPU, retries=1)
    spot = dataclasses.replace(job, spot=True)
    assert run(job, [None, None, 0], disrupted=True) == Outcome(2, False)
    assert run(spot, [None, None, 0], disrupted=True) == Outcome(3, True)


def test_a_failure_on_a_spot_machine_that_is_taken_away_still_stops_the_job():
    assert run(dataclasses.replace(CPU, spot=True), [2, 0], disrupted=True) == Outcome(1, False)


@pytest.mark.parametrize("other", [75, 76, 137])
@pytest.mark.parametrize("code", STOP_CODES)
def test_one_slice_that_must_stop_stops_the_job_whatever_the_other_returns(code, other):
    spec = jobset(JOBS["two_slices_of_v5e-256"])["spec"]
    policy = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]
    failures = [fail_job(policy, other, False), fail_job(policy, code, False)]
    assert action_for(spec["failurePolicy"], failures) == action_for(spec["failurePolicy"], failures[::-1])
    assert action_for(spec["failurePolicy"], failures) == "FailJobSet"


@pytest.mark.parametrize("change", ["patterns are dropped", "messages are worded differently"])
@pytest.mark.parametrize("code", STOP_CODES)
def test_a_failure_stops_the_job_also_where_messages_can_not_be_matched(code, change):
    """JobSet 0.9 drops the field onJobFailureMessagePatterns; Kubernetes does not promise the wording."""
    spec = jobset(CPU)["spec"]
    failure = fail_job(spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"], code, False)
    if change == "patterns are dropped":
        for rule in spec["failurePolicy"]["rules"]:
            rule.pop("onJobFailureMessagePatterns", None)
    else:
        failure = Failure(failure.reason, "the pod failed")
    assert action_for(spec["failurePolicy"], [failure]) == "FailJobSet"


def test_the_time_limit_ends_the_job_and_leaves_the_grace_to_save():
    spec = jobset(JOBS["v5p-512"])["spec"]
    template = spec["replicatedJobs"][0]["template"]["spec"]
    assert template["activeDeadlineSeconds"] == 24 * 3600
    assert template["template"]["spec"]["terminationGracePeriodSeconds"] == 120
    assert action_for(spec["failurePolicy"], [Failure("DeadlineExceeded")]) == "FailJobSet"


def test_kubernetes_accepts_the_order_of_exit_codes():
    for rule in jobset(CPU)["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]:
        values = rule["onExitCodes"]["values"]
        assert values == sorted(set(values))
        assert 0 not in values


# --- ranks ------------------------------------------------------------------------------------------------------------


def processes(job: JobSpec, *, gke: bool) -> list[ProcessInfo | None]:
    """What each pod's process detects from the manifest and the variables that Kubernetes and GKE add."""
    document = jobset(job)
    name, replicated = document["metadata"]["name"], document["spec"]["replicatedJobs"][0]
    spec = replicated["template"]["spec"]
    variables = {
        entry["name"]: entry["value"] for entry in spec["template"]["spec"]["containers"][0]["env"] if "value" in entry
    }
    host = lambda slice_, index: f"{name}-{replicated['name']}-{slice_}-{index}"
    found = []
    for slice_ in range(replicated["replicas"]):
        names = [f"{host(slice_, index)}.{name}" for index in range(spec["completions"])]
        for index in range(spec["completions"]):
            env = variables | {"JOB_COMPLETION_INDEX": str(index), "HOSTNAME": host(slice_, index)}
            if gke:
                env |= {"TPU_WORKER_ID": str(index), "TPU_WORKER_HOSTNAMES": ",".join(names)}
            if gke and replicated["replicas"] > 1:
                env |= {
                    "MEGASCALE_NUM_SLICES": str(replicated["replicas"]),
                    "MEGASCALE_SLICE_ID": str(slice_),
                    "MEGASCALE_COORDINATOR_ADDRESS": f"{host(0, 0)}.{name}",
                }
            found.append(detect_process(env))
    return found


@pytest.mark.parametrize(("name", "gke"), [("two_slices_of_v5e-256", True), ("v5p-512", True), ("v5p-512", False),
                                           ("8_nodes_of_h100", False), ("sweep", False)])  # fmt: skip
def test_each_pod_has_its_own_rank_and_the_coordinator_is_pod_0_of_the_first_job(name, gke):
    job = JOBS[name]
    first = dataclasses.replace(job, name=f"{job.name}-0", runs=()) if job.runs else job
    found = processes(first, gke=gke)
    assert [info.process for info in found] == list(range(job.slices * job.nodes))
    assert {info.num_processes for info in found} == {len(found)}
    # The name of a pod in the DNS: <jobSet.name>-<replicatedJob.name>-<job-index>-<pod-index>.<subdomain>
    assert {info.coordinator for info in found} == {f"{first.name}-hosts-0-0.{first.name}:8476"}
    assert {info.local_devices for info in found} == {None}


def test_a_job_of_one_host_runs_alone():
    one_host = dataclasses.replace(CPU, accelerator="v6e:2x4")
    assert processes(CPU, gke=False) == [None]
    assert processes(one_host, gke=True) == [None]
