"""The Kubernetes cluster of the current context: connection, requests, and their errors in one line.

Called by `launch.kubernetes` and `launch.pods`. The package ``kubernetes`` (extra ``launch``) is imported only here.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from t5like.errors import ConfigError, one_line

GROUP, VERSION, PLURAL = "jobset.x-k8s.io", "v1alpha2", "jobsets"
TIMEOUT = (10, 60)  # seconds to connect, and to wait for an answer


class Cluster(NamedTuple):
    """A connection.

    Attributes:
        core: `kubernetes.client.CoreV1Api`: pods, logs, claims.
        custom: `kubernetes.client.CustomObjectsApi`: JobSets, queues.
        scheduling: `kubernetes.client.SchedulingV1Api`: priority classes.
        host: address of the API server.
        context: name of the context; empty inside a cluster.
        namespace: of the context.
    """

    core: Any
    custom: Any
    scheduling: Any
    host: str
    context: str
    namespace: str

    def jobset(self, action: str, namespace: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the JobSet resource, such as ``create``, ``get`` or ``delete``."""
        method = getattr(self.custom, f"{action}_namespaced_custom_object")
        return method(GROUP, VERSION, namespace, PLURAL, *arguments, _request_timeout=TIMEOUT, **options)


def connect(context: str = "") -> Cluster:
    """Connect to the cluster of a context of the kubeconfig; empty: the current one, or the cluster of this pod.

    Raises:
        ConfigError: the package is missing, or there is no context.
    """
    try:
        import kubernetes
    except ImportError:
        raise ConfigError(
            "the Python package kubernetes is needed for launch kubernetes and is not installed; "
            "run pip install 't5like[launch]', or use --dry_run and kubectl"
        ) from None
    configuration, namespace = kubernetes.client.Configuration(), "default"
    try:
        file = os.environ.get("KUBECONFIG", "~/.kube/config")
        kubernetes.config.load_kube_config(file, context=context or None, client_configuration=configuration)
        contexts, current = kubernetes.config.list_kube_config_contexts(file)
        chosen = next((entry for entry in contexts if entry["name"] == context), current)
        context, namespace = chosen["name"], chosen["context"].get("namespace") or "default"
    except kubernetes.config.ConfigException as error:
        try:
            if context:
                raise kubernetes.config.ConfigException
            kubernetes.config.load_incluster_config(client_configuration=configuration)
        except kubernetes.config.ConfigException:
            raise ConfigError(
                f"there is no Kubernetes cluster to submit to: {one_line(error)}; "
                "set KUBECONFIG, or choose a context with kubectl config use-context"
            ) from None
    configuration.retries = False
    client = kubernetes.client.ApiClient(configuration)
    api = kubernetes.client
    return Cluster(
        api.CoreV1Api(client),
        api.CustomObjectsApi(client),
        api.SchedulingV1Api(client),
        configuration.host,
        context,
        namespace,
    )


@contextlib.contextmanager
def one_line_errors(cluster: Cluster, namespace: str, name: str) -> Iterator[None]:
    """Turn errors of requests for the job `name` into a ConfigError.

    Raises:
        ConfigError: the request failed.
    """
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        raise ConfigError(_explain(error, cluster, namespace, name)) from None
    except HTTPError as error:
        raise ConfigError(
            f"the Kubernetes cluster at {cluster.host} does not respond: {one_line(error)}; "
            "check the network, or choose another context with kubectl config use-context"
        ) from None


def answer(error: Any) -> dict[str, Any]:
    """Return the ``Status`` object of an `ApiException`; empty if the server sent none."""
    try:
        body = json.loads(error.body)
    except (TypeError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def _explain(error: Any, cluster: Cluster, namespace: str, name: str) -> str:
    status = answer(error)
    message = one_line(status.get("message") or error.reason or f"HTTP status {error.status}")
    kind = (status.get("details") or {}).get("kind", "")
    if error.status == 401:
        return f"the Kubernetes cluster at {cluster.host} refuses your credentials; log in again"
    if error.status == 403:
        return f"the Kubernetes cluster forbids this: {message}; ask for the rights, or use another --namespace"
    if error.status == 404 and not kind:  # the server has no such path: "404 page not found"
        return "JobSet is not installed in this cluster; ask for JobSet 0.10 or later (jobset.sigs.k8s.io)"
    if error.status == 404 and kind == "namespaces":
        return f"--namespace={namespace} does not exist in this cluster; use --namespace={cluster.namespace}"
    if error.status == 404:
        return f"there is no job {name} in namespace {namespace}; it may have been deleted"
    if error.status == 409:
        return (
            f"--name={name} is the name of a job in namespace {namespace} already; use another --name, or remove that "
            f"job with t5like launch cancel kubernetes:{namespace}/{name}"
        )
    if "unknown field" in message:
        return f"JobSet in this cluster is too old: {message}; ask for JobSet 0.10 or later"
    return f"the Kubernetes cluster refuses the job: {message}"
