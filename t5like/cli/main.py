"""The command line: reads it, settles what must be settled before JAX starts, runs one command, gives the exit code.

Exit codes: 0 done; 2 config or command line, 3 data or tokenizer, 4 checkpoint or storage, 5 diverged (one line each,
no traceback unless --debug); 75 preempted, and saved what there was, 76 another process of the run lost or stuck (both:
start again); 70 an internal error; 129, 130 and 143 ended by SIGHUP, Ctrl-C and SIGTERM, where nothing was to be saved.

Nobody has to read what a command prints. One whose result is files (`FILES`) then goes on in silence and ends with its
own code. One that only prints ends at once: quietly with 141 where the reader left, as programs in front of `head` do,
and in one line with 4 where standard output can't be written, as on a full disk.
"""

import argparse
import contextlib
import ctypes
import errno
import hashlib
import os
import platform
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from t5like.checkpoint import run_lock
from t5like.cli.commands import COMMANDS
from t5like.cli.flags import parse
from t5like.distributed.launchers import ProcessInfo, cloud_tpu, detect_process
from t5like.errors import CheckpointError, ConfigError, UserError, printable
from t5like.io import signals, streams
from t5like.io.paths import cache_directory

MOVE_WEIGHTS = ("import", "export")  # commands that hold the weights once: what they free goes back
FILES = (*MOVE_WEIGHTS, "train", "prepare", "evaluate")  # commands whose result is files; and generate --output
STARTS = {
    "coordinator": "T5LIKE_COORDINATOR",
    "num_processes": "T5LIKE_NUM_PROCESSES",
    "process_id": "T5LIKE_PROCESS_ID",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Without `arguments` it is this process's own: its standard streams are then guarded, and a signal that stops the
    command ends the process here, without a wait for threads that compile.
    """
    own = arguments is None
    if own:
        streams.guard()
    arguments = list(sys.argv[1:] if own else arguments)
    request = None
    try:
        with run_lock.released(), signals.raise_on_signals(training=arguments[:1] == ["train"]) as request:
            run_command(arguments)
        code = 0
    except (Exception, KeyboardInterrupt) as error:
        interrupted = request.interrupted if request else None
        code = report(interrupted or error, debug="--debug" in arguments)
        if own and interrupted:
            streams.ignore_lost_output()
            sys.stdout.flush()
            os._exit(code)
    finally:
        streams.ignore_lost_output()  # whatever is left to flush
    return code


def run_command(arguments: Sequence[str]) -> None:
    """Read a command line and run its command."""
    try:
        options, overrides = parse(arguments)
    except SystemExit:  # --help
        sys.stdout.flush()
        raise
    if options.command in FILES or getattr(options, "output", None):
        streams.ignore_lost_output()
    start_devices(options.fake_devices)
    if options.command in MOVE_WEIGHTS:
        give_freed_memory_back()
    else:
        keep_freed_memory()
    options.begin = place(options)
    COMMANDS[options.command](options, overrides)
    sys.stdout.flush()


def report(error: BaseException, *, debug: bool) -> int:
    """Say on standard error what ended a command; returns the exit code."""
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


def place(options: argparse.Namespace) -> ProcessInfo | None:
    """This process's place among several that run the same command; None if it is alone.

    Raises:
        ConfigError: a launcher did not say all of it, or the command is for one process.
    """
    flags = {name: getattr(options, flag, None) for flag, name in STARTS.items()}
    variables = {**os.environ, **{name: value for name, value in flags.items() if value}}
    if options.command == "train" or (options.command == "evaluate" and options.tasks is None):
        return detect_process(variables | cloud_tpu(variables))
    if options.command == "prepare":  # several make one store side by side, and need not know of each other
        return None
    with contextlib.suppress(ConfigError):  # half of what a launcher says, as in a shell on a login node
        begin = detect_process(variables)
        if begin:
            raise UserError(
                f"t5like {options.command} is for one process, and {begin.launcher} started {begin.num_processes}; "
                "start one, or set T5LIKE_NUM_PROCESSES=1 in each"
            )
    return None


def start_devices(fake_devices: int | None) -> None:
    """Set what JAX and the allocator read once, when they start."""
    if fake_devices:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={fake_devices}"
        )
    # Compiled programs are kept, so that the second start of the same run is quick. They are code, and made for this
    # kind of processor: the folder is the user's own, and one per processor.
    processor = (
        hashlib.sha256(Path("/proc/cpuinfo").read_bytes().split(b"flags", 1)[-1].split(b"\n", 1)[0]).hexdigest()[:8]
        if Path("/proc/cpuinfo").exists()
        else platform.machine()
    )
    cache = cache_directory("~/.cache/t5like/compiled") / processor
    with contextlib.suppress(OSError):  # a home that can't be written only costs time
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


def give_freed_memory_back() -> None:
    """Have glibc map what is larger than 1 MiB by itself, so that it is gone when it is freed.

    Else that limit grows with what is freed, up to 32 MiB, and parts of weights stay in the heaps of many threads.
    """
    mmap_threshold = -3  # malloc.h
    _mallopt({mmap_threshold: 2**20})


def keep_freed_memory() -> None:
    """Have glibc keep what XLA:CPU frees, instead of returning it to the kernel and faulting it in again every step.

    That is a third of a training step's time on a CPU, for more resident memory; it does nothing where an accelerator
    does the work, or without glibc. It must happen before the process has threads.
    """
    accelerator = any(next(Path("/dev").glob(pattern), None) for pattern in ("nvidia[0-9]*", "accel*", "vfio/[0-9]*"))
    if accelerator and os.environ.get("JAX_PLATFORMS") != "cpu":
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # malloc.h
    # Trimmed never; a number would have to fit an int, and 2 GiB are freed in every step.
    _mallopt({arena_max: 1, mmap_max: 0, trim_threshold: -1})


def _mallopt(settings: dict[int, int]) -> None:
    """Set options of glibc's allocator, in this order; nothing without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for option, value in settings.items() if mallopt else ():
        mallopt(option, value)
