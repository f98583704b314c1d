"""The command line: reads it, settles what must be settled before JAX starts, runs one command, gives the exit code.

Exit codes: 0 done; 2 config or command line, 3 data or tokenizer, 4 checkpoint or storage, 5 diverged (one line each,
no traceback unless --debug); 75 preempted and saved, 76 another process of the run lost or stuck (both: start again);
70 a bug of ours.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t5like import __version__, config_file
from t5like.environment import Start, cloud_tpu, environment
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
        options.begin = place(options)
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

    start_flags(sub)

    sub = command("prepare", "Make the tokenizer and the token store, without training.")
    sub.add_argument("--config", required=True, metavar="FILE")
    sub.add_argument("--workdir", type=Path, metavar="RUN", help="also put config and tokenizer into a run directory")

    sub = command("evaluate", "Print and write a run's held-out metrics, or those of public tasks, as JSON.")
    sub.add_argument("--workdir", required=True, type=Path, metavar="RUN")
    sub.add_argument("--step", type=int, metavar="N", help="of the checkpoint; default: the latest")
    sub.add_argument(
        "--tasks", metavar="NAME[,NAME]", help="of lm-evaluation-harness instead (pip install 't5like[harness]')"
    )
    sub.add_argument(
        "--tasks_dir", type=Path, metavar="DIR", help="of YAML files with more tasks; paths in them start there"
    )
    sub.add_argument("--limit", type=int, metavar="N", help="the first N examples of each task")
    sub.add_argument("--num_fewshot", type=int, metavar="N", help="examples before each question")

    start_flags(sub)

    sub = command("generate", "Continue prompts, or fill their <extra_id_N> gaps: one, a file's, or as they are typed.")
    sub.add_argument("--workdir", required=True, type=Path, metavar="RUN")
    sub.add_argument("--step", type=int, metavar="N", help="of the checkpoint; default: the latest")
    sub.add_argument("--prompt", metavar="TEXT", help="without it or a file, lines of standard input are prompts")
    sub.add_argument("--prompts_file", type=Path, metavar="F", help='JSON lines with the field "prompt"')
    sub.add_argument(
        "--output", type=Path, metavar="F", help="the same rows with predictions; the same command again continues it"
    )
    for name, kind, default, text in (
        ("max_new_tokens", int, 64, "at most so many tokens"),
        ("temperature", float, 0.0, "of the sampling; 0: the likeliest token"),
        ("top_k", int, 0, "sample the k likeliest tokens; 0: all"),
        ("top_p", float, 1.0, "sample the likeliest tokens that together have this probability"),
        ("min_p", float, 0.0, "sample tokens at least this fraction as likely as the likeliest"),
        ("repetition_penalty", float, 1.0, "above 1: what was said becomes less likely"),
        ("num_beams", int, 1, "of a beam search; 1: none"),
        ("length_penalty", float, 1.0, "a beam's log-probability is divided by length ** this"),
        ("num_returned", int, 1, "answers per prompt: the best beams, or samples"),
        ("seed", int, 0, "of the sampling"),
    ):
        sub.add_argument(f"--{name}", type=kind, default=default, metavar="N" if kind is int else "X", help=text)
    sub.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; may be given again")

    sub = command("import", "Make a run of a model from elsewhere.")
    sub.add_argument(
        "--format",
        required=True,
        choices=sorted(IMPORTS),
        help="hf: a Hugging Face directory; t5x: a checkpoint of T5X, with --config for its model",
    )
    sub.add_argument("--input", required=True, type=Path, metavar="DIR")
    sub.add_argument("--workdir", required=True, type=Path, metavar="RUN", help="the run directory to make")
    sub.add_argument(
        "--config", metavar="FILE", help="t5x: the model, and tokenizer.path; --config.SECTION.FIELD=VALUE"
    )

    sub = command("export", "Write a run's model for use elsewhere.")
    sub.add_argument(
        "--format",
        required=True,
        choices=sorted(EXPORTS),
        help="hf: a Hugging Face directory; stablehlo: programs for cpu, cuda and tpu",
    )
    sub.add_argument("--workdir", required=True, type=Path, metavar="RUN")
    sub.add_argument("--output", required=True, type=Path, metavar="DIR", help="absent, or an empty directory")
    sub.add_argument("--step", type=int, metavar="N", help="of the checkpoint; default: the latest")
    sub.add_argument("--family", choices=HF_FAMILIES, help="hf: which model class; default: by the config")
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="hf: of the weights")
    sub.add_argument("--max_shard_size", default="5GB", metavar="SIZE", help="hf: of a file of weights; such as 500MB")
    sub.add_argument("--max_new_tokens", type=int, default=64, metavar="N", help="stablehlo: that generate makes")
    sub.add_argument(
        "--prompt_length", type=int, metavar="N", help="stablehlo: tokens that generate reads; default: as in training"
    )
    sub.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="stablehlo: of generate; 0: the likeliest token"
    )

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


STARTS = {
    "coordinator": "T5LIKE_COORDINATOR",
    "num_processes": "T5LIKE_NUM_PROCESSES",
    "process_id": "T5LIKE_PROCESS_ID",
}


def start_flags(command: Parser) -> None:
    """The flags of a process that no launcher tells its place, or another one than the user wants."""
    command.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens, for several processes")
    command.add_argument("--num_processes", metavar="N", help="of the run; 1: alone, whatever a launcher says")
    command.add_argument("--process_id", metavar="I", help="this process, from 0")


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


def versions() -> dict[str, str]:
    """What all processes of a run must have alike besides its config."""
    return {"versions": f"t5like {__version__}, jax {importlib.metadata.version('jax')}"}


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
    from t5like.distributed import joined
    from t5like.train import train

    workdir = options.workdir.expanduser().absolute()
    with joined(options.begin, config, {**versions(), "--workdir": str(workdir)}, debug=options.debug):
        train(config, workdir)


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
    """`t5like evaluate`: the result as JSON on standard output, for people a table on standard error."""
    from t5like import run

    check_tasks_options(options)
    workdir = options.workdir.expanduser().absolute()
    if options.tasks is None:
        from t5like import evaluate
        from t5like.distributed import joined, primary

        config = run.config_of(workdir)
        with joined(options.begin, config, {**versions(), "--step": str(options.step)}, debug=options.debug):
            loaded = run.load(workdir, options.step, all_devices=True)
            values, records = evaluate.evaluate_run(loaded, workdir / "tokenizer.model")
            if not primary():
                return
        print(evaluate.table(values), file=sys.stderr)
        write_evaluation(workdir, str(loaded.step), values, {str(loaded.step): records})
        return
    from t5like import harness  # says at once what is not installed

    loaded, tasks = run.load(workdir, options.step), options.tasks.split(",")
    values, records = harness.evaluate_tasks(
        loaded, tasks, directory=options.tasks_dir, limit=options.limit, shots=options.num_fewshot
    )
    print(harness.table(values), file=sys.stderr)
    name = "+".join(tasks)[:100]
    write_evaluation(
        workdir, f"{loaded.step}.{name}", values, {f"{loaded.step}.{task}": records[task] for task in records}
    )


def check_tasks_options(options: argparse.Namespace) -> None:
    """Refuse what could not be meant."""
    for name in ("tasks_dir", "limit", "num_fewshot"):
        if options.tasks is None and getattr(options, name) is not None:
            raise ConfigError(f"--{name} goes with --tasks; use --tasks=NAME")
    if options.tasks is not None and not all(options.tasks.split(",")):
        raise ConfigError(f"--tasks={options.tasks} must be names with commas between them; use --tasks=lambada_openai")
    if options.tasks_dir is not None and not options.tasks_dir.is_dir():
        raise ConfigError(f"--tasks_dir={options.tasks_dir} is no directory; name one with the tasks' YAML files")
    for name, least in (("limit", 1), ("num_fewshot", 0)):
        if (value := getattr(options, name)) is not None and value < least:
            raise ConfigError(f"--{name}={value} must be at least {least}; use --{name}=5")


def write_evaluation(workdir: Path, name: str, values: dict[str, Any], predictions: dict[str, list[Any]]) -> None:
    """Print values, and write them to ``evaluations/NAME.json`` and each list of records to ``predictions/``."""
    from t5like.answers import write_predictions
    from t5like.data.token_store import written_whole

    text = json.dumps(values, indent=1, ensure_ascii=False)
    print(text)
    path = workdir / "evaluations" / f"{name}.json"
    try:
        path.parent.mkdir(exist_ok=True)
        with written_whole(path) as file:
            file.write(text.encode() + b"\n")
        for each, records in predictions.items():
            if records:
                write_predictions(workdir, each, records)
    except OSError as error:
        raise CheckpointError(f"{path} can't be written: {error.strerror}; the metrics are above") from None


def generate(options: argparse.Namespace, _) -> None:
    """`t5like generate`."""
    import jax

    from t5like import prompting, run
    from t5like.decoding import Decoding
    from t5like.generate import Generator

    if options.prompt is not None and options.prompts_file:
        raise ConfigError("--prompt and --prompts_file can't both be given; use one")
    if options.output and not options.prompts_file:
        raise ConfigError(f"--output={options.output} needs --prompts_file; without, answers are printed")
    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(Decoding)}
    decoding = Decoding(**{**fields, "stop": tuple(options.stop)})
    rows = prompting.read_prompts(options.prompts_file) if options.prompts_file else []
    loaded = run.load(options.workdir.expanduser().absolute(), options.step, all_devices=True)
    generator = Generator(loaded.config, loaded.params, loaded.tokenizer)
    with jax.set_mesh(loaded.mesh):
        if options.prompts_file:
            made_by = {"workdir": str(options.workdir.expanduser().absolute()), "step": loaded.step}
            prompting.answer_file(generator, decoding, options.prompts_file, rows, options.output, made_by)
        elif options.prompt is not None:
            prompting.show(generator, decoding, options.prompt)
        else:
            prompting.converse(generator, decoding)


def import_hf(options: argparse.Namespace, _) -> None:
    """`t5like import --format=hf`."""
    if options.config:
        raise ConfigError("--config is for --format=t5x: a Hugging Face directory has its own; leave it out")
    from t5like.hf.directory import import_run

    for line in import_run(options.input.expanduser(), options.workdir.expanduser().absolute()):
        print(line, flush=True)


def export_hf(options: argparse.Namespace, _) -> None:
    """`t5like export --format=hf`."""
    size = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(K|M|G)?B?", options.max_shard_size.upper())
    if not size or float(size[1]) == 0:
        raise ConfigError(f"--max_shard_size={options.max_shard_size} must be a number of bytes; use 5GB or 500MB")
    from t5like.hf.directory import export_run

    lines = export_run(
        options.workdir.expanduser().absolute(),
        options.output.expanduser().absolute(),
        step=options.step,
        family=options.family,
        dtype=options.dtype,
        max_shard_size=int(float(size[1]) * {None: 1, "K": 1e3, "M": 1e6, "G": 1e9}[size[2]]),
    )
    for line in lines:
        print(line, flush=True)


def import_t5x(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    """`t5like import --format=t5x`."""
    if not options.config:
        raise ConfigError(
            "--format=t5x needs --config: a T5X checkpoint has no config; use --config=configs/t5_small.py"
        )
    config = load_config(options, overrides)
    from t5like.t5x import import_run

    for line in import_run(options.input.expanduser(), options.workdir.expanduser().absolute(), config):
        print(line, flush=True)


def export_stablehlo(options: argparse.Namespace, _) -> None:
    """`t5like export --format=stablehlo`."""
    for field in ("max_new_tokens", "prompt_length"):
        if (value := getattr(options, field)) is not None and value < 1:
            raise ConfigError(f"--{field}={value} must be at least 1; use --{field}=64")
    if not 0 <= options.temperature < math.inf:
        raise ConfigError(f"--temperature={options.temperature:g} must be at least 0; use --temperature=0.8")
    from t5like.stablehlo import export_run

    for line in export_run(
        options.workdir.expanduser().absolute(),
        options.output.expanduser().absolute(),
        step=options.step,
        max_new_tokens=options.max_new_tokens,
        prompt_length=options.prompt_length,
        temperature=options.temperature,
    ):
        print(line, flush=True)


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


HF_FAMILIES = ("t5", "mt5", "umt5", "llama", "qwen3", "mistral", "gpt2", "bert")
IMPORTS = {"hf": import_hf, "t5x": import_t5x}
EXPORTS = {"hf": export_hf, "stablehlo": export_stablehlo}
COMMANDS = {
    "train": train,
    "prepare": prepare,
    "evaluate": evaluate,
    "generate": generate,
    "import": lambda options, overrides: IMPORTS[options.format](options, overrides),
    "plan": plan,
    "export": lambda options, overrides: EXPORTS[options.format](options, overrides),
}
