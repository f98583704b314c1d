"""The command line: reads it, settles what must be settled before JAX starts, runs one command, gives the exit code.

Exit codes: 0 done; 2 config or command line, 3 data or tokenizer, 4 checkpoint or storage, 5 diverged (one line each,
no traceback unless --debug); 75 preempted and saved; 70 a bug of ours.
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import math
import os
import platform
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from t5like import config_file
from t5like.errors import CheckpointError, ConfigError, UserError

if TYPE_CHECKING:
    from t5like.config import Config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's) and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        options, overrides = parse(arguments)
        start_devices(options.fake_devices)
        COMMANDS[options.command](options, overrides)
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"t5like: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("t5like: stopped", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        print("t5like: this is a bug of ours; please report it with the lines above", file=sys.stderr)
        return 70
    return 0


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Split a command line into options and config overrides, the pairs of ``--config.section.field=value``.

    Raises:
        ConfigError: it is not understood.
    """
    overrides, rest = [], []
    for argument in arguments:
        if argument.startswith("--config."):
            name, equals, value = argument.removeprefix("--config.").partition("=")
            if not equals:
                raise ConfigError(f"{argument} needs a value, as in {argument}=VALUE")
            overrides.append((name, value))
        else:
            rest.append(argument)
    options = build_parser().parse_args(rest)
    if overrides and not getattr(options, "config", None):
        raise ConfigError(
            f"--config.{overrides[0][0]} can't be set for {options.command}: it takes the run's own config"
        )
    return options, overrides


class Parser(argparse.ArgumentParser):
    """Argparse whose refusals are ours: one line, exit code 2."""

    def error(self, message: str) -> None:
        raise ConfigError(f"{message}; see {self.prog} --help")


def build_parser() -> Parser:
    """All commands and their flags."""
    parser = Parser(prog="t5like", description="Pretrain T5-like language models.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, text: str) -> Parser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("--fake_devices", type=int, metavar="N", help="N CPU devices in this process")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    sub = command("train", "Train a model; the same command again continues the run.")
    sub.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="a config, such as configs/tiny.py; --config.SECTION.FIELD=VALUE changes a field",
    )
    sub.add_argument("--workdir", required=True, type=Path, metavar="RUN", help="the run directory")

    sub = command("prepare", "Make the tokenizer and the token store, without training.")
    sub.add_argument("--config", required=True, metavar="FILE")
    sub.add_argument("--workdir", type=Path, metavar="RUN", help="also put config and tokenizer into a run directory")

    sub = command("evaluate", "Print and write a run's held-out metrics as JSON.")
    sub.add_argument("--workdir", required=True, type=Path, metavar="RUN")
    sub.add_argument("--step", type=int, metavar="N", help="of the checkpoint; default: the latest")

    sub = command("generate", "Continue a prompt, or fill its <extra_id_N> gaps.")
    sub.add_argument("--workdir", required=True, type=Path, metavar="RUN")
    sub.add_argument("--prompt", required=True, metavar="TEXT")
    sub.add_argument("--step", type=int, metavar="N", help="of the checkpoint; default: the latest")
    sub.add_argument("--max_new_tokens", type=int, default=64, metavar="N")
    sub.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0: the likeliest token")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling")

    sub = command("plan", "Say what a run needs on a machine that is not here: memory, time, network, cost.")
    sub.add_argument("--config", required=True, metavar="FILE")
    sub.add_argument("--topology", required=True, metavar="NAME", help="v5e:16x16, v5p:8x8x8, v6e:8x8, v4:4x4x8, cpu:8")
    sub.add_argument("--num_slices", type=int, default=1, metavar="N", help="of that topology")
    sub.add_argument("--json", action="store_true", help="print JSON instead of tables")
    sub.add_argument("--quick", action="store_true", help="estimate in seconds, without compiling")
    sub.add_argument(
        "--search",
        type=int,
        nargs="?",
        const=0,
        metavar="N",
        help="try meshes, remat policies and microbatches; compile the N fastest",
    )
    sub.add_argument("--tokens", type=float, metavar="N", help="of the run, such as 2e12; default: train.num_steps")
    sub.add_argument("--price", type=float, metavar="X", help="of a chip for an hour")
    sub.add_argument("--workdir", type=Path, metavar="RUN", help="check that this run directory can be written")
    sub.add_argument("--keep", type=Path, metavar="DIR", help="keep the compiled programs there")
    return parser


def start_devices(fake_devices: int | None) -> None:
    """Set what JAX and the allocator read once, when they start."""
    if fake_devices is not None and fake_devices < 1:
        raise ConfigError(f"--fake_devices={fake_devices} must be at least 1; use --fake_devices=8")
    if fake_devices:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={fake_devices}"
        )
    keep_freed_memory()
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


def keep_freed_memory() -> None:
    """Have glibc keep what XLA:CPU frees, instead of returning it to the kernel and faulting it in again every step.

    That is a third of a training step's time on a CPU, for more resident memory; it does nothing where an accelerator
    does the work, or without glibc. It must happen before the process has threads.
    """
    accelerator = any(next(Path("/dev").glob(pattern), None) for pattern in ("nvidia[0-9]*", "accel*", "vfio/[0-9]*"))
    if sys.platform != "linux" or (accelerator and os.environ.get("JAX_PLATFORMS") != "cpu"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        trim_threshold, mmap_max, arena_max = -1, -4, -8  # malloc.h
        mallopt(arena_max, 1)
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)  # never; a number would have to fit an int, and 2 GiB are freed in every step


def load_config(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> "Config":
    """The config of the command line."""
    return config_file.load(options.config, overrides)


def train(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    """`t5like train`."""
    config = load_config(options, overrides)
    from t5like.train import train

    train(config, options.workdir.expanduser().absolute())


def prepare(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    """`t5like prepare`."""
    config = load_config(options, overrides)
    from t5like.data import corpus, pipeline

    pipeline.spec(config)
    if options.workdir:
        from t5like.run import check_run_directory, open_run_directory

        check_run_directory(config, workdir := options.workdir.expanduser().absolute())
    prepared = corpus.prepare(config)
    for note in prepared.notes:
        print(note)
    print(f"tokenizer  {prepared.tokenizer_path}")
    for source, store in zip(config.data.source, prepared.stores, strict=True):
        train, heldout = store.split("train"), store.split("heldout")
        print(
            f"data       {source}: {train.num_tokens:,} tokens to train on, {heldout.num_tokens:,} held out, "
            f"in {store.directory}"
        )
    if options.workdir:
        open_run_directory(config, prepared.tokenizer, workdir)


def evaluate(options: argparse.Namespace, _) -> None:
    """`t5like evaluate`."""
    from t5like import evaluate, run
    from t5like.answers import write_predictions

    workdir = options.workdir.expanduser().absolute()
    loaded = run.load(workdir, options.step)
    values, records = evaluate.evaluate_run(loaded, workdir / "tokenizer.model")
    text = json.dumps(values, indent=1)
    path = workdir / "evaluations" / f"{loaded.step}.json"
    print(text)
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n")
        if records:
            write_predictions(workdir, loaded.step, records)
    except OSError as error:
        raise CheckpointError(f"{path} can't be written: {error.strerror}; the metrics are above") from None


def generate(options: argparse.Namespace, _) -> None:
    """`t5like generate`."""
    from t5like import run
    from t5like.generate import Generator, fill

    if options.max_new_tokens < 1:
        raise ConfigError(f"--max_new_tokens={options.max_new_tokens} must be at least 1; use --max_new_tokens=64")
    if not 0 <= options.temperature < math.inf:
        raise ConfigError(f"--temperature={options.temperature:g} must be at least 0; use --temperature=0.8")
    if not 0 <= options.seed < 2**32:
        raise ConfigError(f"--seed={options.seed} must be at least 0 and less than 2**32; use --seed=0")
    loaded = run.load(options.workdir.expanduser().absolute(), options.step)
    generator = Generator(loaded.config, loaded.params, loaded.tokenizer)
    [answer] = generator(
        [options.prompt], max_new_tokens=options.max_new_tokens, temperature=options.temperature, seed=options.seed
    )
    gaps = "<extra_id_" in options.prompt and loaded.config.model.architecture != "encoder"
    print(fill(options.prompt, answer) if gaps else answer)


def plan(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    """`t5like plan`."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # an accelerator that is here stays free
    for flag in ("tokens", "price"):
        value = getattr(options, flag)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(
                f"--{flag}={value:g} must be more than 0; use --{flag}={'2e12' if flag == 'tokens' else 1.2}"
            )
    if options.search is not None and options.search < 0:
        raise ConfigError(f"--search={options.search} must be at least 0; use --search=2")
    config = load_config(options, overrides)
    from t5like.plan import planner, report, topology

    machine = topology.parse(options.topology, options.num_slices)
    paths = [path and path.expanduser().absolute() for path in (options.workdir, options.keep)]
    wishes = planner.Wishes(options.quick, options.search, options.tokens, options.price, *paths)
    made, errors = planner.make(config, machine, wishes, lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(made, indent=1) if options.json else report.text(made))
    if errors:  # the plan is printed all the same
        raise errors[0]


COMMANDS = {"train": train, "prepare": prepare, "evaluate": evaluate, "generate": generate, "plan": plan}
