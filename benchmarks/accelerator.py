"""t5like on the GPU or TPU of this machine, checked and measured by one command, next to compiled PyTorch.

    python benchmarks/accelerator.py [--minutes=8] [--only=matmul,t5_base] [--out=DIR] [--torch_python=PYTHON]

Runs on the first device of JAX's default backend, and needs jax, flax, optax, ml_collections and numpy only; rows are
random tokens with the shapes of the real pipeline. Without an accelerator it runs at toy sizes, as with --shapes=toy:
that shows that everything runs, and its numbers mean nothing. The parts, in order:

    attention_values  the kernel that the model chooses, against plain attention in exact float32: outputs and gradients
                      in both dtypes, those of the relative bias included
    loss_curve        20 steps of a small T5 on the device in both dtypes, against the CPU in float32
    matmul            rate of large matmuls in bfloat16 and float32
    attention_speed   the kernel, plain attention and cuDNN, forward and backward
    t5_base llama_1b t5_large t5_xl bert_base    training steps in bfloat16 with AdamW
    decoding          T5 base, greedy, 1 and 32 rows

Then the same by transformers and torch.compile, if the interpreter of --torch_python has torch and transformers and
sees the same device. Each library has a process of its own, and the second starts when the first has ended, so that one
device's memory is never shared. A part that fails, or exceeds its time limit, ends its process; the next part gets
another one. Batches are halved until they fit. --kernels=plain trains without fused attention: for its effect, or if
it fails.

Results are lines of DIR/results.jsonl, written when a part is finished. The same command again continues: parts with
equal sizes, code, versions and device are not measured again. DIR/report.json and DIR/report.md have the results of
this machine; jax.log and torch.log what the processes printed. Exit codes: 0 all parts finished and are right, 1 a part
failed or its values are wrong, 2 a wrong command line, 75 the time was over: start the same command again.
"""

import argparse
import contextlib
import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import accelerator_report
from accelerator_shapes import LIMITS, PEER_SHARE, SHAPES, Part, parts

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SCRIPTS = {"t5like": "accelerator_jax.py", "torch": "accelerator_torch.py"}
LOGS = {"t5like": "jax.log", "torch": "torch.log"}
START_SECONDS = 300  # until a process knows its device
LEAST_SECONDS = 15  # a part is not started with less time
VARYING = ("date", "load")  # of a machine, which equal measurements need not share
Row = dict[str, Any]


class Failed(Exception):
    """A process ended, or did not answer in time; the message is one line."""


class Worker:
    """A process that measures parts on request."""

    def __init__(self, program: str, python: str, out: Path, *, toy: bool):
        """Start it and wait until it has described its machine.

        Raises:
            Failed: it ended before.
        """
        self._log = out / LOGS[program]
        command = [python, str(HERE / SCRIPTS[program]), *(["--toy"] if toy else [])]
        with self._log.open("ab") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "encoding": "utf-8"}
            settings = {"env": environment(toy=toy), "cwd": ROOT, "start_new_session": True}
            self._process = subprocess.Popen(command, **settings, **pipes)
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.machine = self._answer(START_SECONDS)["machine"]
        except BaseException:
            self.stop()
            raise

    def measure(self, request: str, seconds: float) -> Row:
        """The result of a part.

        Raises:
            Failed: the process ended, or took longer than so many seconds.
        """
        with contextlib.suppress(BrokenPipeError):  # then the answer says why
            self._process.stdin.write(f"{request}\n")
            self._process.stdin.flush()
        return self._answer(seconds)

    def stop(self) -> None:
        """End the process and those that it has started, which frees the device's memory."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read(self) -> None:
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries print other lines
                self._lines.put(line)
        self._lines.put(None)

    def _answer(self, seconds: float) -> Row:
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            self.stop()
            raise Failed(f"took longer than {seconds:.0f} s") from None
        if line is None:
            text = self._log.read_text("utf-8", errors="replace").split("\n")
            last = next((each.strip() for each in reversed(text) if each.strip()), "no message")
            raise Failed(f"the process ended with exit code {self._process.wait()}: {last[:300]}")
        return json.loads(line)


def environment(*, toy: bool) -> dict[str, str]:
    """Variables of the processes: no memory beyond what is used, the CPU beside the accelerator, empty caches."""
    values = {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    } | dict(os.environ)
    platforms = values.get("JAX_PLATFORMS", "")
    if platforms and "cpu" not in platforms.split(","):
        values["JAX_PLATFORMS"] = f"{platforms},cpu"  # `loss_curve` compares with it
    if not toy:
        values["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    values["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), values.get("PYTHONPATH"))))
    return values


class Store:
    """The finished parts in a JSON-lines file."""

    def __init__(self, path: Path):
        self._path, self._rows = path, {}
        for line in path.read_text("utf-8").split("\n") if path.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # empty, or cut off when a process was killed
            self._rows[row["key"]] = row

    def get(self, key: str) -> Row | None:
        """The row of a part that is finished; None if it is not."""
        row = self._rows.get(key)
        return row if row and row["status"] == "done" else None

    def add(self, row: Row) -> None:
        """Write a row to the disk."""
        self._rows[row["key"]] = row
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps(row)}")  # after a line that was cut off a new one begins
            file.flush()
            os.fsync(file.fileno())


class Run:
    """One call: what is measured, where to, until when."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.begin = options, time.monotonic()
        options.out.mkdir(parents=True, exist_ok=True)
        self.store = Store(options.out / "results.jsonl")
        self.rows: list[Row] = []
        self.left: dict[str, str] = {}  # title of a part -> why it was not measured
        self.machines: dict[str, Row] = {}
        self.toy = options.shapes == "toy"
        self.workers: dict[str, Worker] = {}

    @property
    def spent(self) -> float:
        """Share of the time."""
        return (time.monotonic() - self.begin) / (60 * self.options.minutes)

    def start(self, program: str) -> Worker:
        """The process of a library; starts it if there is none."""
        if program not in self.workers:
            python = sys.executable if program == "t5like" else self.options.torch_python
            self.workers[program] = worker = Worker(program, python, self.options.out, toy=self.toy)
            self.machines[program] = worker.machine
        return self.workers[program]

    def stop(self) -> None:
        """End all processes."""
        while self.workers:
            self.workers.popitem()[1].stop()

    def measure(self, part: Part, until: float) -> None:
        """Measure a part, or take its row from an earlier call; `until` is a share of the time."""
        request = self._request(part)
        key = key_of(part, request, self.machines[part.program], toy=self.toy)
        if row := self.store.get(key):
            self.rows.append(row)
            return say(f"{part.title}: measured before")
        seconds = 60 * self.options.minutes * (until - self.spent)
        if seconds < LEAST_SECONDS:
            self.left[part.title] = "no time was left"
            return None
        begin = time.monotonic()
        row: Row = {"key": key, "part": part.name, "program": part.program, "status": "failed"}
        try:
            limit = seconds if self.toy else min(seconds, part.seconds * max(1.0, self.options.minutes / 8))
            row |= self.start(part.program).measure(request, limit)
        except Failed as error:
            row["error"] = str(error)
        row |= {"seconds": time.monotonic() - begin, "machine": self.machines[part.program]}
        if "result" in row:
            row["status"] = "done"
        else:  # after an error, a process may have lost its device, or memory
            self.left[part.title] = row["error"]
            if part.program in self.workers:
                self.workers.pop(part.program).stop()
        self.store.add(row)
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        return say(f"{part.title}: {row['status']} in {row['seconds']:.0f} s")

    def _request(self, part: Part) -> str:
        """What the process reads: the part; t5like's kernels; the batch of t5like, with which PyTorch begins."""
        ours = next((row for row in self.rows if row["part"] == part.name and row["status"] == "done"), None)
        if part.name not in SHAPES:
            return part.name
        if part.program == "t5like":
            return f"{part.name} {self.options.kernels}"
        if ours is None:
            return part.name
        return f"{part.name} {ours['result']['rows']} {ours['result']['remat']}"


def key_of(part: Part, request: str, machine: Row, *, toy: bool) -> str:
    """What identifies a measurement: its part, sizes, code, versions and device."""
    fixed = {name: value for name, value in machine.items() if name not in VARYING}
    text = json.dumps([part.name, part.program, request, toy, fixed, source_digest()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def source_digest() -> str:
    """Digest of the code that is measured, and of the benchmarks."""
    paths = [path for folder in ("t5like", "benchmarks", "configs") for path in (ROOT / folder).rglob("*.py")]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(paths))).hexdigest()[:16]


def say(line: str) -> None:
    """Print progress."""
    print(line, file=sys.stderr, flush=True)


def why_no_torch(python: str) -> str | None:
    """Why PyTorch can't be measured with an interpreter, before it is started; None: it can."""
    code = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ('torch', 'transformers'))))"
    try:
        missing = subprocess.run([python, "-c", code], check=False, capture_output=True).returncode
    except OSError as error:
        raise SystemExit(f"accelerator.py: --torch_python={python} can't be started: {error.strerror}") from None
    return f"{python} has no torch and transformers; use --torch_python=PYTHON" if missing else None


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line."""
    text = "Check and measure t5like on an accelerator."
    parser = argparse.ArgumentParser(prog="accelerator.py", description=text, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/accelerator"), metavar="DIR", help="of the results")
    parser.add_argument("--minutes", type=float, default=8, help="time of the whole call")
    parser.add_argument("--only", default="", metavar="PART,...", help=f"of {', '.join(LIMITS)}; empty: all")
    parser.add_argument("--shapes", choices=["auto", "real", "toy"], default="auto", help="auto: toy on a CPU")
    parser.add_argument("--kernels", choices=["auto", "plain"], default="auto", help="model.kernels of training steps")
    parser.add_argument("--torch_python", default=sys.executable, help="an interpreter that has torch and transformers")
    parser.add_argument("--peers", choices=["torch", ""], default="torch", help="empty: without PyTorch")
    parser.error = lambda message: fail(f"{message}; see accelerator.py --help")
    options = parser.parse_args(arguments)
    options.only = [name for name in options.only.split(",") if name] or list(LIMITS)
    if unknown := [name for name in options.only if name not in LIMITS]:
        fail(f"--only={','.join(unknown)} must name parts; use {', '.join(LIMITS)}")
    if not options.minutes > 0:
        fail(f"--minutes={options.minutes:g} must be above 0; use --minutes=8")
    return options


def fail(message: str) -> None:
    """End with one line and exit code 2."""
    say(f"accelerator.py: {message}")
    raise SystemExit(2)


def run_all(run: Run) -> None:
    """Measure all parts of a call: first t5like's, then those of PyTorch."""
    options = run.options
    try:
        machine = run.start("t5like").machine
    except Failed as error:
        fail(f"JAX does not start: {error}")
    if machine["platform"] == "cpu" and options.shapes == "real":
        fail("JAX finds no accelerator; install 't5like[cuda]' or 't5like[tpu]', or use --shapes=toy")
    if machine["platform"] == "cpu" and not run.toy:
        run.stop()  # its process has the variables of real sizes
        run.toy = True
    why = why_no_torch(options.torch_python) if options.peers else None
    chosen = list(parts(options.only, torch=bool(options.peers)))
    alone = why is not None or not options.peers
    for part in chosen:
        if part.program == "t5like":
            run.measure(part, 1.0 if alone else 1 - PEER_SHARE)
    run.stop()
    for part in chosen:
        if part.program == "torch" and why is None:
            why = start_torch(run, machine["platform"])
        if part.program == "torch" and why is None:
            run.measure(part, 1.0)
        elif part.program == "torch":
            run.left[part.title] = why


def start_torch(run: Run, platform: str) -> str | None:
    """Start PyTorch's process, or say why it can't be compared."""
    try:
        found = run.start("torch").machine["platform"]
    except Failed as error:
        return f"PyTorch does not start: {error}"
    return None if found == platform else f"PyTorch runs on {found}, JAX on {platform}"


class Stopped(BaseException):
    """A signal asks the process to end."""


def main(arguments: list[str]) -> int:
    """Run the parts of a command line; returns the exit code."""
    run = Run(parse(arguments))

    def stop(number: int, _: object) -> None:
        raise Stopped(128 + number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        run_all(run)
        code = None
    except Stopped as error:
        code = error.args[0]
        say("accelerator.py: stopped; the same command again continues")
    finally:
        run.stop()
        for number, handler in previous.items():
            signal.signal(number, handler)
    if run.machines:
        command = f"python benchmarks/accelerator.py {' '.join(arguments)}".strip()
        report = accelerator_report.make(run.rows, run.machines, run.left, command, toy=run.toy)
        (options := run.options).out.joinpath("report.json").write_text(json.dumps(report, indent=1), "utf-8")
        text = accelerator_report.markdown(report)
        options.out.joinpath("report.md").write_text(text, "utf-8")
        say(f"\n{text}\n{options.out}/report.md, report.json, results.jsonl")
    if code is not None:
        return code
    if any(row["status"] != "done" or not row["result"]["passed"] for row in run.rows):
        return 1
    return 75 if "no time was left" in run.left.values() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
