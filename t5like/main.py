"""The command line: reads it, settles what must be settled before JAX starts, runs one command, gives the exit code.

Exit codes: 0 done; 2 config or command line, 3 data or tokenizer, 4 checkpoint or storage, 5 diverged (one line each,
no traceback unless --debug); 75 preempted and saved, 76 another process of the run lost or stuck (both: start again);
70 a bug of ours; 130 and 143 stopped by Ctrl-C and SIGTERM, where there was nothing to save.
"""

import argparse
import contextlib
import ctypes
import hashlib
import os
import platform
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from t5like.commands import COMMANDS
from t5like.environment import Start, cloud_tpu, environment
from t5like.errors import ConfigError, UserError
from t5like.flags import parse

MOVE_WEIGHTS = ("import", "export")  # commands that hold the weights once: what they free goes back
UNWOUND = (*MOVE_WEIGHTS, "generate", "plan")  # commands that SIGTERM stops as Ctrl-C does
STARTS = {
    "coordinator": "T5LIKE_COORDINATOR",
    "num_processes": "T5LIKE_NUM_PROCESSES",
    "process_id": "T5LIKE_PROCESS_ID",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's) and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        options, overrides = parse(arguments)
        start_devices(options.fake_devices)
        if options.command in MOVE_WEIGHTS:
            give_freed_memory_back()
        else:
            keep_freed_memory()
        options.begin = place(options)
        with unwound() if options.command in UNWOUND else contextlib.nullcontext():
            COMMANDS[options.command](options, overrides)
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"t5like: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as stop:
        print("t5like: stopped", file=sys.stderr)
        return 128 + signal_of(stop)
    except Exception:
        traceback.print_exc()
        print("t5like: this is a bug of ours; please report it with the lines above", file=sys.stderr)
        return 70
    return 0


@contextlib.contextmanager
def unwound() -> Iterator[None]:
    """Within, SIGTERM unwinds the program, so that what is half made, and processes that it started, go with it.

    What is raised while Python collects garbage is ignored, and JAX has much to do there: such a signal comes again.
    """

    def stop(number: int, _) -> None:
        raise KeyboardInterrupt(number)

    def ignored(what) -> None:
        if isinstance(what.exc_value, KeyboardInterrupt):
            threading.Timer(0.01, os.kill, (os.getpid(), signal_of(what.exc_value))).start()
        else:
            hook(what)

    before, hook = signal.signal(signal.SIGTERM, stop), sys.unraisablehook
    sys.unraisablehook = ignored
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.unraisablehook = hook


def signal_of(stop: KeyboardInterrupt) -> int:
    """The signal that raised it: Python's own for Ctrl-C names none."""
    return stop.args[0] if stop.args else signal.SIGINT


def place(options: argparse.Namespace) -> Start | None:
    """This process's place among several that run the same command; None if it is alone.

    Raises:
        ConfigError: a launcher did not say all of it, or the command is for one process.
    """
    flags = {name: getattr(options, flag, None) for flag, name in STARTS.items()}
    variables = {**os.environ, **{name: value for name, value in flags.items() if value}}
    if options.command == "train" or (options.command == "evaluate" and options.tasks is None):
        return environment(variables | cloud_tpu(variables))
    if options.command == "prepare":  # several make one store side by side, and need not know of each other
        return None
    with contextlib.suppress(ConfigError):  # half of what a launcher says, as in a shell on a login node
        begin = environment(variables)
        if begin:
            raise UserError(
                f"t5like {options.command} is for one process, and {begin.environment} started {begin.num_processes}; "
                "start one, or set T5LIKE_NUM_PROCESSES=1 in each"
            )
    return None


def start_devices(fake_devices: int | None) -> None:
    """Set what JAX and the allocator read once, when they start."""
    if fake_devices is not None and fake_devices < 1:
        raise ConfigError(f"--fake_devices={fake_devices} must be at least 1; use --fake_devices=8")
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
    cache = Path("~/.cache/t5like/compiled").expanduser() / processor
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
