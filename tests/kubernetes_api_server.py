"""A small Kubernetes API server for tests: it stores objects by their paths, over HTTP, behind a kubeconfig.

It answers as kube-apiserver does: creation with dry run and strict field validation, lists by label selector, logs as
streams, and errors as ``Status`` objects. There are no controllers: a test changes the stored objects itself.
Source of paths and errors: Kubernetes' API concepts (kubernetes.io/docs/reference/using-api/api-concepts).
"""

import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jsonschema
import yaml

SCHEMA = json.loads((Path(__file__).parent / "golden/launch/schemas/jobset_v1alpha2.json").read_text("utf-8"))
JOBSETS = "/apis/jobset.x-k8s.io/v1alpha2/namespaces/research/jobsets"
PODS = "/api/v1/namespaces/research/pods"
QUEUES = "/apis/kueue.x-k8s.io/v1beta1/namespaces/research/localqueues"
WORKLOADS = "/apis/kueue.x-k8s.io/v1beta1/namespaces/research/workloads"
CLAIMS = "/api/v1/namespaces/research/persistentvolumeclaims"
ACCOUNTS = "/api/v1/namespaces/research/serviceaccounts"
PRIORITIES = "/apis/scheduling.k8s.io/v1/priorityclasses"
PATHS = (JOBSETS, PODS, QUEUES, WORKLOADS, CLAIMS, ACCOUNTS, PRIORITIES)
TIME = "2026-11-28T09:00:00.%09dZ"


class ApiServer:
    """The server.

    Attributes:
        objects: by path.
        logs: texts by the name of a pod; a followed log waits until the pod has ended.
        served: paths of resources that the cluster has.
        forbidden: paths that this user may not use.
        requests: (method, path, query) of each request.
    """

    def __init__(self):
        self.objects: dict[str, dict] = {}
        self.logs: dict[str, str] = {}
        self.served, self.forbidden = set(PATHS), set()
        self.requests: list[tuple[str, str, dict]] = []
        handler = type("Handler", (_Handler,), {"state": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def address(self) -> str:
        """The server's URL."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def write_kubeconfig(self, path: Path) -> None:
        """Write a kubeconfig whose context ``lab`` has the namespace ``research``."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "lab",
            "clusters": [{"name": "lab", "cluster": {"server": self.address}}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "me", "namespace": "research"}}],
            "users": [{"name": "me", "user": {}}],
        }
        path.write_text(yaml.safe_dump(config), encoding="utf-8")

    def add(self, path: str, name: str, **fields) -> dict:
        """Store an object and return it."""
        metadata = {"name": name, **fields.pop("metadata", {})}
        self.objects[f"{path}/{name}"] = {"metadata": metadata, **fields}
        return self.objects[f"{path}/{name}"]

    def add_pod(self, jobset: str, process: int, phase: str, log: str = "", **status) -> dict:
        """Store a pod of a JobSet with one Job."""
        name = f"{jobset}-hosts-0-{process}-{len(self.logs):05x}"
        labels = {
            "jobset.sigs.k8s.io/jobset-name": jobset,
            "jobset.sigs.k8s.io/job-index": "0",
            "batch.kubernetes.io/job-completion-index": str(process),
        }
        self.logs[name] = log
        return self.add(PODS, name, metadata={"labels": labels}, status={"phase": phase, **status})

    def close(self) -> None:
        """Stop the server."""
        self._server.shutdown()
        self._server.server_close()


def terminated(code: int) -> list[dict]:
    """Return `containerStatuses` of a container that has ended."""
    state = {"terminated": {"exitCode": code}}
    return [{"name": "main", "state": state, "image": "", "imageID": "", "ready": False, "restartCount": 0}]


class _Handler(BaseHTTPRequestHandler):
    state: ApiServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _parse(self) -> tuple[str, dict]:
        parts = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(parts.query))
        self.state.requests.append((self.command, parts.path, query))
        return parts.path, query

    def _send(self, code: int, body: dict | str) -> None:
        text = body if isinstance(body, str) else json.dumps(body)
        self.send_response(code)
        self.send_header("Content-Type", "text/plain" if isinstance(body, str) else "application/json")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def _fail(self, code: int, reason: str, message: str, kind: str = "") -> None:
        details = {"kind": kind} if kind else {}
        self._send(code, {"kind": "Status", "reason": reason, "message": message, "details": details, "code": code})

    def _refused(self, path: str) -> bool:
        """Answer a request for a resource that is not served or not allowed."""
        resource = next((known for known in PATHS if path == known or path.startswith(f"{known}/")), path)
        kind = resource.rpartition("/")[2]
        if resource in self.state.forbidden:
            self._fail(403, "Forbidden", f'{kind} is forbidden: User "me" cannot use resource "{kind}"', kind)
        elif resource not in self.state.served and "/namespaces/research/" not in f"{path}/":
            namespace = path.split("/namespaces/")[-1].split("/")[0]
            self._fail(404, "NotFound", f'namespaces "{namespace}" not found', "namespaces")
        elif resource not in self.state.served:
            self._send(404, "404 page not found\n")
        else:
            return False
        return True

    def do_GET(self):
        path, query = self._parse()
        if path.endswith("/log"):
            return self._stream(path.split("/")[-2], query)
        if self._refused(path):
            return None
        if path in self.state.objects:
            return self._send(200, self.state.objects[path])
        if path not in PATHS:
            kind, name = path.split("/")[-2:]
            return self._fail(404, "NotFound", f'{kind} "{name}" not found', kind)
        items = [item for key, item in self.state.objects.items() if key.rpartition("/")[0] == path]
        selected = [item for item in items if _selected(item, query.get("labelSelector", ""))]
        return self._send(200, {"kind": "List", "apiVersion": "v1", "metadata": {}, "items": selected})

    def do_POST(self):
        path, query = self._parse()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused(path):
            return None
        name = body["metadata"]["name"]
        errors = jsonschema.Draft202012Validator(SCHEMA).iter_errors(body)
        if error := next(errors, None):
            unknown = error.validator == "additionalProperties"
            prefix = "strict decoding error: unknown field: " if unknown else "invalid: "
            return self._fail(400, "BadRequest", prefix + error.message)
        if f"{path}/{name}" in self.state.objects:
            return self._fail(409, "AlreadyExists", f'jobsets "{name}" already exists', "jobsets")
        if "dryRun" not in query:
            self.state.objects[f"{path}/{name}"] = body
        return self._send(201, body)

    def do_DELETE(self):
        path, _ = self._parse()
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self._refused(path):
            self.state.objects.pop(path, None)
            self._send(200, {"kind": "Status", "status": "Success"})

    def _stream(self, pod: str, query: dict) -> None:
        """Send a log, one line in a chunk; a followed one is open until the pod has ended."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number, line in enumerate(self.state.logs[pod].splitlines()):
            stamp = f"{TIME % number} " if query.get("timestamps") else ""
            data = f"{stamp}{line}\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.write(b"0\r\n\r\n")


def _selected(item: dict, selector: str) -> bool:
    """Return whether labels match ``key=value`` or ``key in (a,b)``."""
    labels = item["metadata"].get("labels", {})
    if match := re.fullmatch(r"(\S+) in \((.*)\)", selector):
        return labels.get(match[1]) in match[2].split(",")
    key, _, value = selector.partition("=")
    return not selector or labels.get(key) == value
