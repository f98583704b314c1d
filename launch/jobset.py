"""JobSet manifests of a job for Kubernetes: dictionaries, and their YAML. Pure: no client and no cluster.

A JobSet (``jobset.x-k8s.io/v1alpha2``) owns one Job per TPU slice, whose pods are the hosts: `replicas` is the number
of slices, `completions` and `parallelism` are the hosts of a slice. If a pod fails, its Job fails with a reason, and
the reason decides whether the JobSet starts all of its Jobs again. `failure_policy` has both halves of that decision.

Sources: kubernetes-sigs/jobset, ``api/jobset/v1alpha2/jobset_types.go`` (fields), ``pkg/webhooks/jobset_webhook.go``
(names) and ``pkg/controllers/failure_policy.go`` (order of the rules); kubernetes/kubernetes,
``pkg/controller/job/pod_failure_policy.go`` (messages of a failed Job) and ``third_party/forked/golang/expansion``
(``$(NAME)``); AI-Hypercomputer/xpk, ``src/xpk/commands/workload.py`` (slices of TPUs); GKE's pages "Deploy TPU
workloads", "Deploy TPU Multislices", "Spot VMs" and "Cloud Storage FUSE CSI driver"; Kueue's page "Run a JobSet".
"""

import re
from typing import Any

import yaml

from launch.accelerators import ACCELERATORS, chips_per_host
from launch.job import COORDINATOR_PORT, RESTART_CODES, JobSpec, SweepRun, run_directory, t5like_command

API_VERSION = "jobset.x-k8s.io/v1alpha2"
HOSTS = "hosts"  # name of the replicated job; pods are NAME-hosts-SLICE-HOST
CONTAINER = "main"
USER = 1000  # user and group of the container's process, and group of its volumes
PREEMPTED = RESTART_CODES[0]  # saved: starting again is no retry
KILLED_CODES = (137, 143)  # 128 + SIGKILL (also: out of memory), 128 + SIGTERM
DAYS_KEPT = 7  # of a finished JobSet and its pods, whose logs vanish with them
RENAME_LIMIT = 1_000_000  # files of a directory that gcsfuse renames, as checkpoints need; it refuses larger ones
LOCKED_MEMORY_KIB = 68719476736  # GKE's value for TPU containers that are not privileged
INSTANCE = "app.kubernetes.io/instance"  # label with the job's name: all runs of a sweep have it
QUEUE = "kueue.x-k8s.io/queue-name"

Manifest = dict[str, Any]


def manifests(job: JobSpec) -> list[Manifest]:
    """Return one JobSet, or one for each run of a sweep: a run that fails must not end or restart the others."""
    return [jobset(job, name, run) for name, run in zip(names(job), job.runs or (None,), strict=True)]


def names(job: JobSpec) -> list[str]:
    """Return the names of the job's JobSets: ``NAME``, or ``NAME-0``, ``NAME-1``, ... of a sweep."""
    return [f"{job.name}-{index}" for index in range(len(job.runs))] or [job.name]


def jobset(job: JobSpec, name: str, run: SweepRun | None) -> Manifest:
    """Return the manifest of one run."""
    labels = {"app.kubernetes.io/name": "t5like", INSTANCE: job.name}
    annotations = {"t5like/workdir": run_directory(job, run)}
    if job.platform == "tpu" and job.slices > 1:  # all hosts of a slice in one node pool, and no two slices in the same
        annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
    metadata: Manifest = {"name": name} | ({"namespace": job.namespace} if job.namespace else {})
    metadata |= {"labels": labels | ({QUEUE: job.queue} if job.queue else {}), "annotations": annotations}
    pod_failure_policy, failure_policy_ = failure_policy(job)
    template = {
        "parallelism": job.nodes,
        "completions": job.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        **({"activeDeadlineSeconds": job.time_limit} if job.time_limit else {}),
        "podFailurePolicy": pod_failure_policy,
        "template": {
            "metadata": {"labels": dict(labels), "annotations": pod_annotations(job)},
            "spec": pod(job, name, run),
        },
    }
    spec = {
        **({"suspend": True} if job.queue else {}),  # Kueue starts it
        "ttlSecondsAfterFinished": DAYS_KEPT * 24 * 3600,
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": failure_policy_,
        "replicatedJobs": [{"name": HOSTS, "replicas": job.slices, "template": {"spec": template}}],
    }
    return {"apiVersion": API_VERSION, "kind": "JobSet", "metadata": metadata, "spec": spec}


def failure_policy(job: JobSpec) -> tuple[Manifest, Manifest]:
    """Return the Job's `podFailurePolicy` and the JobSet's `failurePolicy`.

    | a pod ends with                       | its Job fails with reason | the JobSet                                |
    |---------------------------------------|---------------------------|-------------------------------------------|
    | 75: preempted and saved               | PodFailurePolicy, index 1 | starts again, not counted                 |
    | 76, 137, 143, or with its host        | BackoffLimitExceeded      | starts again, at most `retries` times     |
    | with its host, and `spot`             | PodFailurePolicy, index 2 | starts again, not counted                 |
    | any other code                        | PodFailurePolicy, index 0 | stops                                     |
    | the time limit, by SIGTERM            | DeadlineExceeded          | stops: the run has saved                  |

    JobSet tells the first and the fourth row apart by the message of the failed Job, which ends with the index of the
    rule (since JobSet 0.10). A JobSet controller that ignores message patterns, or a message that matches none of them,
    stops the job.
    """
    rules: list[Manifest] = [
        {
            "action": "FailJob",
            "onExitCodes": {
                "containerName": CONTAINER,
                "operator": "NotIn",
                "values": sorted((*RESTART_CODES, *KILLED_CODES)),
            },
        },
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [PREEMPTED]},
        },
    ]
    if job.spot:
        rules.append({"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]})
    preempted = "[12]" if job.spot else "1"
    reason = {"onJobFailureReasons": ["PodFailurePolicy"]}
    jobset_rules = [
        {
            "name": "failed",
            "action": "FailJobSet",
            **reason,
            "onJobFailureMessagePatterns": ["matching FailJob rule at index 0$"],
        },
        {
            "name": "preempted",
            "action": "RestartJobSetAndIgnoreMaxRestarts",
            **reason,
            "onJobFailureMessagePatterns": [f"matching FailJob rule at index {preempted}$"],
        },
        {"name": "unknown_message", "action": "FailJobSet", **reason},
        {"name": "time_limit", "action": "FailJobSet", "onJobFailureReasons": ["DeadlineExceeded"]},
    ]
    return {"rules": rules}, {"maxRestarts": job.retries, "rules": jobset_rules}


def pod_annotations(job: JobSpec) -> dict[str, str]:
    """Return the annotations of the pods."""
    return {"gke-gcsfuse/volumes": "true"} if has_bucket(job) else {}


def has_bucket(job: JobSpec) -> bool:
    """Return whether the job mounts a bucket of Cloud Storage."""
    return any(mount.source.startswith("gs://") for mount in job.mounts)


def pod(job: JobSpec, name: str, run: SweepRun | None) -> Manifest:
    """Return the specification of a pod, which is one host."""
    spec: Manifest = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace,
        "enableServiceLinks": False,  # no variables for the services of the namespace
        "automountServiceAccountToken": bool(job.service_account),
    }
    spec |= {"serviceAccountName": job.service_account} if job.service_account else {}
    spec |= {"priorityClassName": job.priority} if job.priority else {}
    # Traffic between slices is faster on the hosts' network; there, a bucket's driver has no account.
    if job.platform == "tpu" and job.slices > 1 and not has_bucket(job):
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    spec |= {"nodeSelector": selector} if (selector := node_selector(job)) else {}
    spec |= {"tolerations": accepted} if (accepted := tolerations(job)) else {}
    root = job.platform == "tpu"  # the device files of TPUs belong to root
    user = {"runAsUser": 0} if root else {"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER}
    on_mismatch = {} if root else {"fsGroupChangePolicy": "OnRootMismatch"}
    spec["securityContext"] = {**user, **on_mismatch, "seccompProfile": {"type": "RuntimeDefault"}}
    spec["containers"] = [container(job, name, run)]
    spec["volumes"] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}, *volumes(job)]
    return spec


def node_selector(job: JobSpec) -> dict[str, str]:
    """Return the labels that nodes must have: those of the TPU slice, of spot nodes, and the job's own."""
    labels = {}
    if job.platform == "tpu":
        labels["cloud.google.com/gke-tpu-accelerator"] = ACCELERATORS[job.topology.kind].kubernetes_label
        labels["cloud.google.com/gke-tpu-topology"] = "x".join(map(str, job.topology.shape))
    if job.spot:
        labels["cloud.google.com/gke-spot"] = "true"
    return labels | dict(job.node_selector)


def tolerations(job: JobSpec) -> list[Manifest]:
    """Return the taints of nodes that the pods accept."""
    accepted = []
    if resource := accelerator_resource(job):
        accepted.append({"key": next(iter(resource)), "operator": "Exists", "effect": "NoSchedule"})
    if job.spot:
        spot = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        accepted.append(spot)
    return accepted


def accelerator_resource(job: JobSpec) -> dict[str, int]:
    """Return the accelerators of one host by resource name."""
    if job.platform == "tpu":
        return {"google.com/tpu": chips_per_host(job.topology)}
    return {"nvidia.com/gpu": job.gpus_per_node} if job.platform == "gpu" else {}


def container(job: JobSpec, name: str, run: SweepRun | None) -> Manifest:
    """Return the one container of a pod, which runs one process of t5like."""
    cpus = {"cpu": job.cpus_per_process} if job.cpus_per_process else {}
    limits = {**({"memory": f"{job.memory_gib}Gi"} if job.memory_gib else {}), **accelerator_resource(job)}
    capabilities = {"drop": ["ALL"]} | ({"add": ["SYS_RESOURCE"]} if job.platform == "tpu" else {})
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    for index, mount in enumerate(job.mounts):
        read_only = {"readOnly": True} if mount.read_only else {}
        mounts.append({"name": f"mount-{index}", "mountPath": mount.path, **read_only})
    return {
        "name": CONTAINER,
        "image": job.image,
        "imagePullPolicy": "IfNotPresent",
        "command": [escape(part) for part in command(job, run)],
        **({"workingDir": job.directory} if job.directory else {}),
        "env": environment(job, name),
        "resources": {"requests": cpus | limits, "limits": limits},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": capabilities},
        "volumeMounts": mounts,
    }


def command(job: JobSpec, run: SweepRun | None) -> list[str]:
    """Return the arguments of the container's process, behind a shell if lines come before it.

    `exec` makes Python the process that receives SIGTERM.
    """
    setup = [f"ulimit -l {LOCKED_MEMORY_KIB} || true"] if job.platform == "tpu" else []  # TPU transfers pin memory
    if not (lines := [*setup, *job.setup]):
        return t5like_command(job, run)
    return ["/bin/bash", "-ec", "\n".join([*lines, 'exec "$@"']), "bash", *t5like_command(job, run)]


def environment(job: JobSpec, name: str) -> list[Manifest]:
    """Return the variables of the container; secrets are references.

    GKE adds TPU_WORKER_ID, TPU_WORKER_HOSTNAMES and, with several slices, MEGASCALE_* to the pods of a TPU slice; they
    contain the rank of the process. Elsewhere it is JOB_COMPLETION_INDEX, which Kubernetes adds to indexed jobs.
    """
    values = {"PYTHONUNBUFFERED": "1", "T5LIKE_NUM_PROCESSES": str(job.num_processes)}
    if job.num_processes > 1:
        values["T5LIKE_COORDINATOR"] = f"{name}-{HOSTS}-0-0.{name}:{COORDINATOR_PORT}"  # pod 0 of the first Job
    if job.compile_cache:
        values["JAX_COMPILATION_CACHE_DIR"] = job.compile_cache
    variables: list[Manifest] = [{"name": key, "value": escape(text)} for key, text in (values | dict(job.env)).items()]
    for secret in job.secrets:
        source, _, key = secret.reference.partition("/")
        variables.append({"name": secret.name, "valueFrom": {"secretKeyRef": {"name": source, "key": key}}})
    return variables


def volumes(job: JobSpec) -> list[Manifest]:
    """Return the volumes of the job's mounts: buckets of Cloud Storage (GKE's CSI driver) and claims."""
    found = []
    for index, mount in enumerate(job.mounts):
        scheme, _, source = mount.source.partition(":")
        read_only = {"readOnly": True} if mount.read_only else {}
        if scheme == "pvc":
            volume = {"persistentVolumeClaim": {"claimName": source, **read_only}}
        else:
            bucket, _, folder = source.removeprefix("//").strip("/").partition("/")
            user = "" if job.platform == "tpu" else f",uid={USER},gid={USER}"
            options = f"implicit-dirs,rename-dir-limit={RENAME_LIMIT}{user}" + (f",only-dir={folder}" if folder else "")
            attributes = {"bucketName": bucket, "mountOptions": options}
            volume = {"csi": {"driver": "gcsfuse.csi.storage.gke.io", **read_only, "volumeAttributes": attributes}}
        found.append({"name": f"mount-{index}", **volume})
    return found


def escape(text: str) -> str:
    """Return a text that reaches the container unchanged.

    Kubernetes replaces ``$(NAME)`` in commands and variables by the value of a variable, and ``$$`` by ``$``; it
    damages a character outside ASCII that follows a single ``$``.
    """
    return re.sub(r"\$(?=[$(]|[^\x00-\x7f])", "$$", text)


class Dumper(yaml.SafeDumper):
    """Writes YAML whose strings are strings for every parser: 1.1 and 1.2 differ in ``1e3``, ``0o7`` or ``y``."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: Dumper, text: str) -> yaml.ScalarNode:
    plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9/._-]{2,}", text)
    style = "|" if "\n" in text else None if plain else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Dumper.add_representer(str, _text)


def dump(documents: list[Manifest]) -> str:
    """Return the YAML of manifests, in the order of their fields."""
    return yaml.dump_all(
        documents, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10_000, explicit_start=True
    )
