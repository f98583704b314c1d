"""Entry point of the command line: set up the process before JAX starts, run one command, return the exit code.

Exit codes: 0 done; 2 config or command line, 3 data or tokenizer, 4 checkpoint or storage, 5 diverged (one line each,
no traceback unless --debug); 75 preempted with everything saved, 76 another process of the run is lost or does not
respond (both: start the same command again); 70 an internal error; 129, 130 and 143 ended by SIGHUP, Ctrl-C and
SIGTERM with nothing to save.

When standard output is closed or can't be written, a command whose result is files (`FILE_COMMANDS`) continues without
printing and returns its own code. A command that only prints ends at once: with 141 and no message when the reader has
closed the pipe, as `head` does; with 4 and one line when the write fails, as on a full disk.
"""

import argparse
import contextlib
import errno
import gc
import hashlib
import os
import platform
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from t5like.checkpoint import run_lock
from t5like.cli import commands, inspections
from t5like.cli.flags import parse
from t5like.distributed.launchers import ProcessInfo, cloud_tpu, detect_process
from t5like.errors import CheckpointError, ConfigError, UserError, printable
from t5like.io import signals, streams
from t5like.io.paths import cache_directory
from t5like.io.storage import storage_errors
from t5like.sharding import allocator

COMMANDS = {**commands.COMMANDS, **inspections.COMMANDS}
CONTINUING = (["train"], ["rl"], ["prepare"])  # commands that continue when they are started again
CONVERSIONS = ("import", "export")  # commands that hold each weight once, and return its memory to the system
FILE_COMMANDS = (
    *CONVERSIONS,
    "train",
    "rl",
    "prepare",
    "evaluate",
    "embed",
)  # commands whose result is files; and generate --output
PROCESS_VARIABLES = {  # flag -> the environment variable that it overrides
    "coordinator": "T5LIKE_COORDINATOR",
    "num_processes": "T5LIKE_NUM_PROCESSES",
    "process_id": "T5LIKE_PROCESS_ID",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Without `arguments`, the command line is that of this process. Then its standard streams are guarded, and a signal
    that stops the command ends the process here, without waiting for threads that compile.
    """
    own = arguments is None
    if own:
        streams.guard()
    arguments = list(sys.argv[1:] if own else arguments)
    request = None
    try:
        with run_lock.released(), signals.raise_on_signals(continues=arguments[:1] in CONTINUING) as request:
            code = run_command(arguments)
    except (Exception, KeyboardInterrupt) as error:
        interrupted = request.interrupted if request else None
        code = report(interrupted or error, debug="--debug" in arguments)
        if own and interrupted:
            streams.ignore_lost_output()
            sys.stdout.flush()
            os._exit(code)
    finally:
        streams.ignore_lost_output()  # of the last flush
    return code


def run_command(arguments: Sequence[str]) -> int:
    """Read a command line and run its command; returns the exit code."""
    if arguments[:1] == ["launch"]:  # the job's flags and the command are parsed there
        from launch.main import launch

        return launch(arguments[1:])
    try:
        options, overrides = parse(arguments)
    except SystemExit:  # --help
        sys.stdout.flush()
        raise
    if options.command == "completion":
        from t5like.cli import completion

        print(completion.script(options.shell), end="")
        sys.stdout.flush()
        return 0
    if options.command in FILE_COMMANDS or getattr(options, "output", None):
        streams.ignore_lost_output()
    start_devices(options.fake_devices)
    collect_garbage_rarely()
    if options.command in CONVERSIONS:
        allocator.return_freed()
    else:
        allocator.keep_freed()
    options.process = process_info(options)
    with storage_errors():
        COMMANDS[options.command](options, overrides)
    sys.stdout.flush()
    return 0


def report(error: BaseException, *, debug: bool) -> int:
    """Print the error that ended a command on standard error; return the exit code."""
    if isinstance(error, KeyboardInterrupt):
        stopped = error if isinstance(error, signals.Interrupted) else "stopped"
        print(f"t5like: {stopped}", file=sys.stderr)
        return getattr(error, "exit_code", 130)
    if error is streams.lost_output:
        if error.errno == errno.EPIPE:
            return streams.NO_READER
        error = CheckpointError(f"standard output can't be written: {error.strerror}; send it elsewhere")
    if isinstance(error, UserError):
        if debug:
            traceback.print_exception(error)
        print(f"t5like: {printable(str(error), longest=2000)}", file=sys.stderr)
        return error.exit_code
    traceback.print_exception(error)
    print("t5like: internal error; please report it with the lines above", file=sys.stderr)
    return 70


def process_info(options: argparse.Namespace) -> ProcessInfo | None:
    """Return the rank of this process among those that run the same command; None if it runs alone.

    Raises:
        ConfigError: a variable of the launcher is missing, or the command is for one process.
    """
    flags = {name: getattr(options, flag, None) for flag, name in PROCESS_VARIABLES.items()}
    variables = {**os.environ, **{name: value for name, value in flags.items() if value}}
    if options.command in ("train", "rl") or (options.command == "evaluate" and options.tasks is None):
        return detect_process(variables | cloud_tpu(variables))
    if options.command == "prepare":  # several processes may prepare one store in parallel, without a rendezvous
        return None
    with contextlib.suppress(ConfigError):  # incomplete variables of a launcher, as in a shell on a login node
        if process := detect_process(variables):
            raise UserError(
                f"t5like {options.command} is for one process, and {process.launcher} started {process.num_processes}; "
                "start one, or set T5LIKE_NUM_PROCESSES=1 in each"
            )
    return None


def start_devices(fake_devices: int | None) -> None:
    """Set the environment variables that JAX reads once, when it starts."""
    if fake_devices:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={fake_devices}"
        )
    # The compilation cache makes the second start of the same run fast. It contains machine code for this type of
    # processor, so there is one folder per processor type, which only the user can write.
    processor = (
        hashlib.sha256(Path("/proc/cpuinfo").read_bytes().split(b"flags", 1)[-1].split(b"\n", 1)[0]).hexdigest()[:8]
        if Path("/proc/cpuinfo").exists()
        else platform.machine()
    )
    cache = cache_directory("~/.cache/t5like/compiled") / processor
    with contextlib.suppress(OSError):  # without a cache, the run only starts more slowly
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


def collect_garbage_rarely() -> None:
    """Look for unused cycles rarely: imports and traces make millions of objects that stay, and hardly any cycles.

    With Python's own thresholds this search is an eighth of the time that a training run takes to start.
    """
    gc.set_threshold(50_000, 20, 50)
