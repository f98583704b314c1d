"""The pods of a job on Kubernetes: what each one does, and their logs as one. Called by `launch.kubernetes`."""

import datetime
import math
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from launch.cluster import TIMEOUT, Cluster
from launch.jobset import CONTAINER
from t5like.errors import one_line, printable

POLL_SECONDS = 2.0  # between two looks at the pods, while a log is followed
SILENT_SECONDS = 3600  # without a line, after which a followed log is requested again
JOBSET_NAME = "jobset.sigs.k8s.io/jobset-name"
JOB_INDEX = "jobset.sigs.k8s.io/job-index"
POD_INDEX = "batch.kubernetes.io/job-completion-index"
EXIT_CODES = {
    2: "config or command line",
    3: "data or tokenizer",
    4: "checkpoint or storage",
    5: "the run diverged",
    70: "internal error",
    75: "preempted and saved",
    76: "another process lost",
    137: "killed, perhaps out of memory",
    143: "ended by SIGTERM",
}


class Pod(NamedTuple):
    """One host of a run.

    Attributes:
        name: of the pod.
        jobset: name of its JobSet.
        process: rank of its process.
        phase: of Kubernetes: Pending, Running, Succeeded, Failed or Unknown.
        problem: why it does not run; empty if nothing is known.
        exit_code: of its container; None before the end.
    """

    name: str
    jobset: str
    process: int
    phase: str
    problem: str
    exit_code: int | None


def find(cluster: Cluster, namespace: str, jobsets: list[dict]) -> list[Pod]:
    """Return the pods of JobSets that have not been deleted, in the order of runs and processes."""
    hosts = {
        jobset["metadata"]["name"]: jobset["spec"]["replicatedJobs"][0]["template"]["spec"].get("completions", 1)
        for jobset in jobsets
    }
    selector = f"{JOBSET_NAME} in ({','.join(hosts)})"
    listed = cluster.core.list_namespaced_pod(namespace, label_selector=selector, _request_timeout=TIMEOUT).items
    pods = []
    for item in listed:
        labels = (item.metadata.annotations or {}) | (item.metadata.labels or {})
        jobset = labels[JOBSET_NAME]
        process = int(labels.get(JOB_INDEX, 0)) * hosts.get(jobset, 1) + int(labels.get(POD_INDEX, 0))
        pods.append(Pod(item.metadata.name, jobset, process, item.status.phase, _problem(item), _exit_code(item)))
    order = list(hosts)
    return sorted(pods, key=lambda pod: (order.index(pod.jobset), pod.process, pod.name))


def _container_state(item: Any) -> Any:
    statuses = item.status.container_statuses or []
    return next((status.state for status in statuses if status.name == CONTAINER), None)


def _exit_code(item: Any) -> int | None:
    state = _container_state(item)
    return state.terminated.exit_code if state and state.terminated else None


def _problem(item: Any) -> str:
    """Return why a pod waits or was ended: the scheduler's, the container's or the pod's own reason."""
    state = _container_state(item)
    if state and state.waiting and state.waiting.reason not in (None, "ContainerCreating", "PodInitializing"):
        return _join(state.waiting.reason, state.waiting.message)
    for condition in item.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return _join(condition.reason, condition.message)
        if condition.type == "DisruptionTarget" and condition.status == "True":
            return _join(condition.reason, condition.message)
    return _join(item.status.reason, item.status.message) if item.status.phase == "Failed" else ""


def _join(reason: str | None, message: str | None) -> str:
    return one_line(": ".join(part for part in (reason, message) if part))


def summary(pods: list[Pod], hosts: int) -> str:
    """Return what the pods of one run do, as one line: how many run, and the first problem."""
    running = sum(pod.phase == "Running" for pod in pods)
    problems = Counter(pod.problem for pod in pods if pod.problem)
    text = f"{running} of {hosts} hosts run" if running < hosts else f"{hosts} hosts run" if hosts > 1 else "it runs"
    if problems:
        problem, count = problems.most_common(1)[0]
        text += f"; {count} not: {problem}"
    return text


def final_code(pods: list[Pod]) -> int | None:
    """Return the exit code that ended a run: one that is not started again, before the codes that follow from it."""
    codes = [pod.exit_code for pod in pods if pod.exit_code]
    return min(codes, key=lambda code: (code in (75, 76, 137, 143), codes.index(code)), default=None)


def explain(code: int) -> str:
    """Return an exit code with its meaning."""
    return f"exit code {code}" + (f" ({EXIT_CODES[code]})" if code in EXIT_CODES else "")


def print_logs(cluster: Cluster, namespace: str, pods: list[Pod]) -> None:
    """Print the logs of pods, one after the other."""
    for pod in pods:
        if pod.phase != "Pending":
            _Log(cluster, namespace, pod, prefix(pod, pods), threading.Lock()).print(follow=False)


def follow_logs(cluster: Cluster, namespace: str, look: Callable[[], tuple[list[Pod], bool]]) -> None:
    """Print the logs of a job's pods as they grow, also of those that restarts create, until the job has ended.

    `look` returns the pods that exist, and whether the job has ended.
    """
    threads: dict[str, threading.Thread] = {}
    lock, ended = threading.Lock(), False
    while not ended:
        pods, ended = look()
        for pod in pods:
            if pod.phase != "Pending" and pod.name not in threads:
                log = _Log(cluster, namespace, pod, prefix(pod, pods), lock)
                threads[pod.name] = threading.Thread(target=log.print, kwargs={"follow": True}, daemon=True)
                threads[pod.name].start()
        if not ended:
            time.sleep(POLL_SECONDS)
    for thread in threads.values():
        thread.join(timeout=TIMEOUT[1])


def prefix(pod: Pod, pods: list[Pod]) -> str:
    """Return what stands before each line of a pod's log: its process, and its run if there are several."""
    several_runs = len({other.jobset for other in pods}) > 1
    several_processes = any(other.process for other in pods)
    parts = [pod.jobset] * several_runs + [str(pod.process)] * (several_processes or several_runs)
    return f"[{' '.join(parts)}] " if parts else ""


class _Log:
    """The log of one pod. The API server ends long requests, so a followed log is requested again where it ended."""

    def __init__(self, cluster: Cluster, namespace: str, pod: Pod, prefix: str, lock: threading.Lock):
        self._cluster, self._namespace, self._pod, self._prefix, self._lock = cluster, namespace, pod, prefix, lock
        self._last = ""  # time of the last line that was printed

    def print(self, *, follow: bool) -> None:
        """Print the lines; with `follow` until the container ends."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        while True:
            try:
                self._print_once(follow)
                if not follow or self._container_ended():
                    return
            except ApiException as error:
                if error.status == 404 or not follow:  # deleted: a restart has replaced it
                    return
            except HTTPError:
                if not follow:
                    raise
            time.sleep(POLL_SECONDS)

    def _print_once(self, follow: bool) -> None:
        since = {"since_seconds": _seconds_since(self._last)} if self._last else {}
        response = self._cluster.core.read_namespaced_pod_log(
            self._pod.name,
            self._namespace,
            container=CONTAINER,
            follow=follow,
            timestamps=True,
            _preload_content=False,
            _request_timeout=(TIMEOUT[0], SILENT_SECONDS) if follow else TIMEOUT,
            **since,
        )
        with response:
            for line in response:
                self._print_line(line.decode("utf-8", "replace").rstrip("\r\n"))

    def _print_line(self, line: str) -> None:
        written_at, _, text = line.partition(" ")
        if written_at <= self._last:
            return
        self._last = written_at
        with self._lock:
            sys.stdout.write(f"{self._prefix}{printable(text, kept=TAB)}\n")
            sys.stdout.flush()

    def _container_ended(self) -> bool:
        item = self._cluster.core.read_namespaced_pod(self._pod.name, self._namespace, _request_timeout=TIMEOUT)
        return item.status.phase in ("Succeeded", "Failed")


TAB = "\t"


def _seconds_since(written_at: str) -> int:
    """Return the age of a time such as ``2026-11-28T09:00:00.123456789Z``, in seconds, rounded up."""
    seconds = re.sub(r"\.\d+", "", written_at).replace("Z", "+00:00")
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(seconds)
    return max(1, math.ceil(age.total_seconds()) + 1)
