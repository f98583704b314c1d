"""Kubernetes as a backend of `t5like launch`: a job is a JobSet, which the ``kubernetes`` package submits.

`check` and `render` need neither the package nor a cluster; `kubectl create -f` accepts what `render` returns. The
manifest is made by `launch.jobset`; `launch.cluster` has the connection, `launch.pods` the pods and their logs.
Called by `launch.main`.
"""

import dataclasses
import re
from typing import Any

import yaml

from launch import cluster, jobset, pods
from launch.accelerators import hosts_per_slice
from launch.cluster import TIMEOUT, Cluster
from launch.flag_values import REFERENCES
from launch.job import JobSpec, Mount, check_name, check_text, storage_that_fits
from launch.record import Record, Submission
from t5like.errors import ConfigError, one_line, printable, shorten

LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"  # RFC 1123
SUBDOMAIN = rf"{LABEL}(\.{LABEL})*"
SERVICE_NAME = r"[a-z]([a-z0-9-]*[a-z0-9])?"  # RFC 1035: the JobSet's name is also the name of its service
LABEL_VALUE = r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?"
LABEL_KEY = rf"({SUBDOMAIN}/)?[A-Za-z0-9]([A-Za-z0-9._-]{{0,61}}[A-Za-z0-9])?"
SECRET = rf"{SUBDOMAIN}/[A-Za-z0-9._-]+"
IMAGE = r"[a-z0-9][a-zA-Z0-9._/:-]*(@sha256:[0-9a-f]{64}|:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})"
LONGEST_POD_NAME = 63
RANDOM_SUFFIX = len("-abcde")  # of a pod's name
KUEUE = "kueue.x-k8s.io"
HEADER = "# A job of t5like: kubectl create -f FILE starts it.\n"


# --- what is rendered -------------------------------------------------------------------------------------------------


def check(job: JobSpec) -> None:
    """Refuse what Kubernetes can't do, and values that would fail in the cluster.

    Raises:
        ConfigError: names the flag, its value, the rule and a value that works.
    """
    check_texts(job)
    check_machines(job)
    check_names(job)
    if not re.fullmatch(IMAGE, job.image):
        raise ConfigError(
            f"--image={job.image} must be an image of a registry with a tag or digest; "
            "use --image=registry.example/t5like:1.0"
        )
    if job.image.endswith(":latest"):
        raise ConfigError(
            f"--image={job.image} may be another image after a restart; use the tag of a version, such as :1.0"
        )
    for mount in job.mounts:
        check_mount(mount)
    paths = [mount.path.rstrip("/") for mount in job.mounts] + ["/dev/shm"]
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise ConfigError(f"--mount has the path {twice} twice; give each mount a path of its own")
    check_shared(job)


def check_texts(job: JobSpec) -> None:
    """Refuse a text that is not one line, or is too long; raises ConfigError."""
    for field in dataclasses.fields(job):
        value = getattr(job, field.name)
        if isinstance(value, str):
            check_text(f"--{field.name}", value)
    several = {
        "the command's argument": job.command,
        "--setup": job.setup,
        "--env": [part for variable in job.env for part in variable],
        "--node_selector": [part for label in job.node_selector for part in label],
        "--secret": [part for secret in job.secrets for part in (secret.name, secret.reference)],
        "--mount": [part for mount in job.mounts for part in (mount.source, mount.path)],
        "the sweep's override": [part for run in job.runs for part in (run.name, *run.overrides)],
    }
    for field, texts in several.items():
        for text in texts:
            check_text(field, text)


def check_machines(job: JobSpec) -> None:
    """Refuse machines that one pod for each host can't be; raises ConfigError."""
    if job.processes_per_node != 1:
        reason = "JAX drives all GPUs of a pod from one process" if job.platform == "gpu" else "a pod is one process"
        raise ConfigError(
            f"--processes_per_node={job.processes_per_node} must be 1 on Kubernetes: {reason}; leave it out"
        )
    if job.platform != "tpu":
        if job.slices > 1:
            raise ConfigError(f"--slices={job.slices} is for TPUs; use more hosts, such as --nodes={job.slices}")
        hosts = job.topology.shape[0] if job.platform == "gpu" else job.nodes
    else:
        hosts = hosts_per_slice(job.topology)
        if job.slices > 1 and hosts == 1:  # GKE, "Deploy TPU Multislices"
            larger = "4x4" if len(job.topology.shape) == 2 else "2x2x2"
            raise ConfigError(
                f"--slices={job.slices} needs slices of several hosts on GKE, and {job.accelerator} is one host; "
                f"use --slices=1 or --accelerator={job.topology.kind}:{larger}"
            )
    if job.nodes != hosts:
        raise ConfigError(f"--nodes={job.nodes} differs from --accelerator={job.accelerator}, which has {hosts} hosts")
    longest = max(map(len, jobset.names(job))) + len(f"-{jobset.HOSTS}-{job.slices - 1}-{job.nodes - 1}")
    if longest + RANDOM_SUFFIX > LONGEST_POD_NAME:
        most = len(job.name) - (longest + RANDOM_SUFFIX - LONGEST_POD_NAME)
        raise ConfigError(
            f"--name={job.name} is too long: with it the names of pods have more than {LONGEST_POD_NAME} characters; "
            f"use at most {most} characters"
        )


def check_names(job: JobSpec) -> None:
    """Refuse names that Kubernetes does not accept; raises ConfigError."""
    check_name("--name", job.name, pattern=SERVICE_NAME, example="--name=my-run")
    for flag, value, pattern, example in (
        ("namespace", job.namespace, LABEL, "research"),
        ("queue", job.queue, SUBDOMAIN, "team-a"),
        ("service_account", job.service_account, SUBDOMAIN, "trainer"),
        ("priority", job.priority, SUBDOMAIN, "high"),
    ):
        if value:
            check_name(f"--{flag}", value, pattern=pattern, example=f"--{flag}={example}")
            if len(value) > 63:
                raise ConfigError(f"--{flag}={value} has {len(value)} characters; use at most 63")
    for name, value in job.node_selector:
        check_name("--node_selector", name, pattern=LABEL_KEY, example="--node_selector=example.org/gpu=h100")
        check_name(f"--node_selector={name}", value, pattern=LABEL_VALUE, example=f"--node_selector={name}=h100")
    for name, _ in job.env:
        check_name("--env", name, pattern=r"[A-Za-z_][A-Za-z0-9_]*", example="--env=NAME=VALUE")
    for secret in job.secrets:
        check_name(
            "--secret", secret.name, pattern=r"[A-Za-z_][A-Za-z0-9_]*", example="--secret=MY_TOKEN=my-secret/key"
        )
        check_name(
            f"--secret={secret.name}",
            secret.reference,
            pattern=SECRET,
            example=f"--secret={secret.name}{REFERENCES['kubernetes']}",
        )


def check_mount(mount: Mount) -> None:
    """Refuse storage that a pod can't mount by its name alone; raises ConfigError."""
    source, path = mount.source, mount.path
    flag = f"--mount={source}:{path}"
    if not path.startswith("/") or path.rstrip("/") == "" or ".." in path.split("/") or ":" in path:
        raise ConfigError(f"{flag} must have an absolute path in the pod, without colons; use --mount={source}:/data")
    if source.startswith("s3://"):
        raise ConfigError(
            f"{flag} can't be mounted by its name: the S3 drivers of Kubernetes need a claim; "
            f"make a PersistentVolumeClaim, and use --mount=pvc:CLAIM:{path}"
        )
    if source.startswith("gs://"):
        pattern = r"gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/[A-Za-z0-9._-]+)*/?"
        use = storage_that_fits(source, pattern, "gs://my-bucket/folder")
        check_name(flag, source, pattern=pattern, example=f"--mount={use}:{path}")
    else:
        use = storage_that_fits(source, pattern := f"pvc:{SUBDOMAIN}", "pvc:my-claim")
        check_name(flag, source, pattern=pattern, example=f"--mount={use}:{path}, or gs://my-bucket:{path}")


def check_shared(job: JobSpec) -> None:
    """Refuse a run directory that a restart would not find; raises ConfigError."""
    if "://" in job.workdir:
        raise ConfigError(
            f"--workdir={job.workdir} must be a path in the pod; mount the storage, such as --mount=gs://BUCKET:/data "
            "with --workdir=/data/runs/a"
        )
    below = lambda mount: f"{job.workdir.rstrip('/')}/".startswith(f"{mount.path.rstrip('/')}/")
    closest = max((mount for mount in job.mounts if below(mount)), key=lambda mount: len(mount.path), default=None)
    if closest is None:
        place = "/" + (job.workdir.strip("/").partition("/")[0] or "runs")
        raise ConfigError(
            f"--workdir={job.workdir} is inside the container and ends with it; put it below a --mount, such as "
            f"--mount=pvc:CLAIM:{place} or --mount=gs://BUCKET:{place}"
        )
    if closest.read_only:
        raise ConfigError(f"--workdir={job.workdir} is below the mount {closest.path}, which is read-only; remove :ro")


def render(job: JobSpec) -> str:
    """Return the YAML of the job's JobSets, which also `kubectl create -f` accepts."""
    return HEADER + jobset.dump(jobset.manifests(job))


# --- the cluster ------------------------------------------------------------------------------------------------------


def submit(job: JobSpec, text: str) -> Submission:
    """Create the JobSets of `text`; all of them, or none if the cluster refuses one.

    Raises:
        ConfigError: no client, no cluster, or the cluster refuses the job.
    """
    documents = list(yaml.safe_load_all(text))
    connection = cluster.connect()
    namespace = job.namespace or connection.namespace
    with cluster.one_line_errors(connection, namespace, job.name):
        options = {"field_validation": "Strict"}  # an unknown field must not be dropped: the failure policy needs all
        for document in documents:
            connection.jobset("create", namespace, document, dry_run="All", **options)
        check_references(connection, job, namespace)
        for document in documents:
            connection.jobset("create", namespace, document, **options)
    job_id = f"{namespace}/{job.name}"
    lines = {
        "follow": f"t5like launch logs --follow kubernetes:{job_id}",
        "status": f"t5like launch status kubernetes:{job_id}",
        "cancel": f"t5like launch cancel kubernetes:{job_id}",
    }
    details = {"namespace": namespace} | ({"context": connection.context} if connection.context else {})
    return Submission(job_id, lines, "", details)


def check_references(connection: Cluster, job: JobSpec, namespace: str) -> None:
    """Refuse a queue, claim, account or class that the cluster does not have: the job would wait for ever.

    What this user may not read is not checked.

    Raises:
        ConfigError: it does not exist, or a claim can't be mounted on several hosts.
    """
    core = connection.core
    claims = {mount.source.removeprefix("pvc:") for mount in job.mounts if mount.source.startswith("pvc:")}
    for claim in sorted(claims):
        found = _read(core.read_namespaced_persistent_volume_claim, claim, namespace)
        if found is False:
            raise ConfigError(f"--mount=pvc:{claim} does not exist in namespace {namespace}; create the claim first")
        modes = getattr(getattr(found, "spec", None), "access_modes", None) or ["ReadWriteMany"]
        if job.nodes * job.slices > 1 and not {"ReadWriteMany", "ReadOnlyMany"} & set(modes):
            raise ConfigError(
                f"--mount=pvc:{claim} has the access modes {', '.join(modes)} and can't be mounted on "
                f"{job.nodes * job.slices} hosts; use a claim with ReadWriteMany"
            )
    if job.service_account and _read(core.read_namespaced_service_account, job.service_account, namespace) is False:
        raise ConfigError(
            f"--service_account={job.service_account} does not exist in namespace {namespace}; create it first"
        )
    if job.priority and _read(connection.scheduling.read_priority_class, job.priority) is False:
        raise ConfigError(f"--priority={job.priority} is no priority class of the cluster; leave it out")
    if job.queue:
        _check_queue(connection, job.queue, namespace)


def _read(read: Any, *names: str) -> Any:
    """Return an object; False if it does not exist, None if this user may not read it."""
    from kubernetes.client import ApiException

    try:
        return read(*names, _request_timeout=TIMEOUT)
    except ApiException as error:
        if error.status == 404:
            return False
        if error.status == 403:
            return None
        raise


def _kueue(connection: Cluster, method: str, namespace: str, *arguments: Any, **options: Any) -> Any:
    """Call a method for Kueue's objects, in the version that the cluster has; False: it does not exist."""
    for version in ("v1beta2", "v1beta1"):
        call = lambda *names, version=version, **rest: getattr(connection.custom, method)(
            KUEUE, version, namespace, *arguments, *names, **options, **rest
        )
        if (found := _read(call)) is not False:
            return found
    return False


def _check_queue(connection: Cluster, queue: str, namespace: str) -> None:
    """Refuse a queue that does not exist, with the names of those that do; raises ConfigError."""
    if _kueue(connection, "get_namespaced_custom_object", namespace, "localqueues", queue) is not False:
        return
    listed = _kueue(connection, "list_namespaced_custom_object", namespace, "localqueues")
    if listed is False:
        raise ConfigError(f"--queue={queue}: Kueue is not installed in this cluster; leave --queue out")
    names = sorted(item["metadata"]["name"] for item in (listed or {}).get("items", []))
    use = f"use {shorten(names)}" if names else "ask for a LocalQueue, or leave --queue out"
    raise ConfigError(f"--queue={queue} does not exist in namespace {namespace}; {use}")


def status(record: Record) -> str:
    """Return one line for each run: its state, the reason, and its restarts."""
    connection, namespace, name = _locate(record)
    with cluster.one_line_errors(connection, namespace, name):
        found = _find(connection, namespace, name)
        everywhere = pods.find(connection, namespace, found)
        return "\n".join(_state(connection, namespace, item, everywhere) for item in found)


def _locate(record: Record) -> tuple[Cluster, str, str]:
    namespace, slash, name = record.id.partition("/")
    if not slash or not namespace or not name:
        raise ConfigError(f"kubernetes:{record.id} must be kubernetes:NAMESPACE/NAME; use kubernetes:default/my-run")
    return cluster.connect(record.details.get("context", "")), namespace, name


def _find(connection: Cluster, namespace: str, name: str) -> list[dict]:
    """Return the JobSets of a job in the order of its runs; raises `ApiException` if there is none."""
    listed = connection.jobset("list", namespace, label_selector=f"{jobset.INSTANCE}={name}")
    if not listed["items"]:
        return [connection.jobset("get", namespace, name)]
    number = lambda item: [int(part) if part.isdecimal() else 0 for part in item["metadata"]["name"].split("-")]
    return sorted(listed["items"], key=number)


def ended(item: dict) -> str:
    """Return ``Completed`` or ``Failed`` if a JobSet has ended, else an empty text."""
    conditions = item.get("status", {}).get("conditions", [])
    types = {condition["type"] for condition in conditions if condition["status"] == "True"}
    return "Completed" if "Completed" in types else "Failed" if "Failed" in types else ""


def _state(connection: Cluster, namespace: str, item: dict, everywhere: list[pods.Pod]) -> str:
    name, state = item["metadata"]["name"], item.get("status", {})
    own = [pod for pod in everywhere if pod.jobset == name]
    replicated = item["spec"]["replicatedJobs"][0]
    hosts = replicated.get("replicas", 1) * replicated["template"]["spec"].get("completions", 1)
    if ended(item) == "Completed":
        text = "done"
    elif ended(item) == "Failed":
        condition = next(condition for condition in state["conditions"] if condition["type"] == "Failed")
        code = pods.final_code(own)
        text = f"failed: {pods.explain(code) + ', ' if code else ''}{condition.get('message') or condition['reason']}"
    elif item["spec"].get("suspend"):
        text = f"waits in the queue{_queue_reason(connection, namespace, item)}"
    else:
        text = pods.summary(own, hosts)
    most = item["spec"].get("failurePolicy", {}).get("maxRestarts", 0)
    counted = state.get("restartsCountTowardsMax", 0)
    return printable(f"{name}  {one_line(text)}; restarts: {state.get('restarts', 0)}, {counted} of {most} counted")


def _queue_reason(connection: Cluster, namespace: str, item: dict) -> str:
    selector = f"{KUEUE}/job-uid={item['metadata'].get('uid', '')}"
    listed = _kueue(connection, "list_namespaced_custom_object", namespace, "workloads", label_selector=selector)
    for workload in (listed or {}).get("items", []):
        for condition in workload.get("status", {}).get("conditions", []):
            if condition["type"] in ("QuotaReserved", "Admitted") and condition["status"] == "False":
                return f": {condition.get('message') or condition['reason']}"
    return ""


def logs(record: Record, *, follow: bool) -> int:
    """Print the logs of all pods, each line with its process number; returns the exit code of the job if it followed.

    With `follow` it continues through restarts until the job ends.
    """
    connection, namespace, name = _locate(record)
    with cluster.one_line_errors(connection, namespace, name):
        if not follow:
            pods.print_logs(connection, namespace, pods.find(connection, namespace, _find(connection, namespace, name)))
            return 0
        seen: dict[str, Any] = {}

        def look() -> tuple[list[pods.Pod], bool]:
            seen["jobsets"] = _find(connection, namespace, name)
            seen["pods"] = pods.find(connection, namespace, seen["jobsets"])
            return seen["pods"], all(map(ended, seen["jobsets"]))

        pods.follow_logs(connection, namespace, look)
    if all(ended(item) == "Completed" for item in seen["jobsets"]):
        return 0
    return pods.final_code(seen["pods"]) or 1


def cancel(record: Record) -> None:
    """Delete the job's JobSets; a run that trains saves within its grace period."""
    connection, namespace, name = _locate(record)
    with cluster.one_line_errors(connection, namespace, name):
        for item in _find(connection, namespace, name):
            connection.jobset("delete", namespace, item["metadata"]["name"], propagation_policy="Foreground")
