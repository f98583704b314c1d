"""One function per command: check the flags, load the run, call the library, print the result.

Each function imports the heavy modules that it needs, so that `--help` and error messages are fast.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t5like import __version__
from t5like.config import loader
from t5like.errors import CheckpointError, ConfigError, printable
from t5like.io.paths import cache_directory, expand
from t5like.io.storage import storage_errors

if TYPE_CHECKING:
    from t5like.config.schema import Config


def versions() -> dict[str, str]:
    """The versions that all processes of a run must share, besides its config."""
    return {"versions": f"t5like {__version__}, jax {importlib.metadata.version('jax')}"}


def load_config(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> "Config":
    """The config of --config; without that flag, the config of the run in --workdir, which `train` continues."""
    if options.config is not None:
        return loader.load(options.config, overrides)
    return loader.load_run(expand(options.workdir), overrides)


def configs(_, __) -> None:
    """`t5like configs`."""
    presets = loader.presets()
    width = max(map(len, presets))
    for name, path in presets.items():
        print(f"{name:{width}}  {loader.description(path)}")


def train(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    """`t5like train`."""
    if options.config is None and options.workdir is None:
        raise ConfigError("--overfit needs a config; use --config=tiny, or the --workdir of a run")
    config = load_config(options, overrides)
    if config.rl.method != "none":
        raise ConfigError(f"rl.method={config.rl.method} is for t5like rl; use t5like rl with the same flags")
    several = options.process is not None and options.process.num_processes > 1
    if several and (options.overfit or options.debug_nan):
        flag = "--overfit" if options.overfit else "--debug_nan"
        raise ConfigError(f"{flag} is for one process; start one, or use t5like replay for a step of this run")
    from t5like.inspect import replay
    from t5like.train.loop import train

    if options.overfit:
        from t5like.inspect import overfit

        show = lambda line: print(printable(line), flush=True)
        overfit.overfit(config, options.overfit, debug_nan=options.debug_nan, show=show)
        return
    _train(options, config, partial(train, examine=replay.first_nonfinite_of if options.debug_nan else None))


def rl(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    """`t5like rl`."""
    config = load_config(options, overrides)
    from t5like.rl.run import audit, run

    if options.audit:
        found = audit(config)
        for line in found.lines:
            print(printable(line))
        if found.useless:
            raise ConfigError(f"rl.rewards: {', '.join(found.useless)} failed for every answer; see the lines above")
        return
    _train(options, config, run)


def _train(options: argparse.Namespace, config: "Config", train: Callable[..., None]) -> None:
    from t5like.checkpoint import allowed_changes
    from t5like.distributed.process_group import process_group
    from t5like.metrics import trackers

    if options.process is None or options.process.process == 0:
        trackers.check(config)
    workdir, allowed = expand(options.workdir).absolute(), allowed_changes.parse(options.allow_change)
    facts = {**versions(), "--workdir": str(workdir)}
    with (
        process_group(options.process, config, facts, debug=options.debug, continues=True),
        storage_errors(workdir),
    ):
        train(config, workdir, allowed=allowed)


def prepare(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    """`t5like prepare`."""
    config = load_config(options, overrides)
    from t5like.checkpoint.run_directory import check_initial_run, check_run_directory, open_run_directory
    from t5like.data import pipeline
    from t5like.data.sources.names import source_names
    from t5like.data.store import preparation, statistics
    from t5like.distributed.process_group import process_group
    from t5like.distributed.shared_file_systems import once_per_file_system

    pipeline.spec(config)
    workdir = expand(options.workdir).absolute() if options.workdir else None
    check_initial_run(config, workdir)
    if workdir:
        check_run_directory(config, workdir)
    directory = cache_directory(config.data.cache_directory)
    with process_group(None, config, {}, continues=True):
        prepared = once_per_file_system("preparing the data", directory, partial(preparation.prepare, config))
    for note in prepared.notes:
        print(printable(note))
    print(printable(f"tokenizer  {prepared.tokenizer_path}"))
    directories = [f"in {store.directory}" for store in prepared.stores]
    for line in statistics.lines(source_names(config.data), prepared.stores, directories):
        print(printable(f"data       {line}"))
    if workdir:
        open_run_directory(config, prepared.tokenizer, workdir)


def heldout(options: argparse.Namespace, _) -> None:
    """`t5like evaluate`: print the result as JSON on standard output, and as a table on standard error."""
    from t5like.checkpoint import run_directory

    check_tasks_options(options)
    workdir = expand(options.workdir).absolute()
    if options.tasks is None:
        from t5like.distributed.process_group import process_group
        from t5like.distributed.processes import is_primary
        from t5like.evaluation import heldout

        config = run_directory.config_of(workdir)
        with process_group(options.process, config, {**versions(), "--step": str(options.step)}, debug=options.debug):
            loaded = run_directory.load(workdir, options.step, all_devices=True)
            if config.rl.method == "none":
                values, records = heldout.evaluate_run(loaded, workdir / "tokenizer.model")
                table = heldout.table
            else:
                from t5like.rl.run import evaluate, table

                values, records = evaluate(loaded, workdir)
            if not is_primary():
                return
        write_evaluation(workdir, str(loaded.step), values, {str(loaded.step): records})
        print(table(values), file=sys.stderr)
        return
    from t5like.evaluation import lm_eval

    loaded, tasks = run_directory.load(workdir, options.step), options.tasks.split(",")
    values, records = lm_eval.evaluate_tasks(
        loaded, tasks, directory=options.tasks_dir, limit=options.limit, shots=options.num_fewshot
    )
    name = "+".join(tasks)[:100]
    write_evaluation(
        workdir, f"{loaded.step}.{name}", values, {f"{loaded.step}.{task}": records[task] for task in records}
    )
    print(lm_eval.table(values), file=sys.stderr)


def check_tasks_options(options: argparse.Namespace) -> None:
    """Refuse flags that belong to --tasks without it, and names of tasks that can't exist."""
    for name in ("tasks_dir", "limit", "num_fewshot"):
        if options.tasks is None and getattr(options, name) is not None:
            raise ConfigError(f"--{name} goes with --tasks; use --tasks=NAME")
    if options.tasks is not None and not all(options.tasks.split(",")):
        raise ConfigError(f"--tasks={options.tasks} must be names with commas between them; use --tasks=lambada_openai")
    if options.tasks_dir is not None and not options.tasks_dir.is_dir():
        raise ConfigError(
            f"--tasks_dir={options.tasks_dir} is not a directory; use the directory of the tasks' YAML files"
        )


def write_evaluation(workdir: Path, name: str, values: dict[str, Any], predictions: dict[str, list[Any]]) -> None:
    """Write values to ``evaluations/NAME.json`` and each list of records to ``predictions/``, then print the values."""
    from t5like.evaluation.task_eval import write_predictions
    from t5like.io.atomic import replace_file

    text = json.dumps(values, indent=1, ensure_ascii=False)
    path = workdir / "evaluations" / f"{name}.json"
    try:
        path.parent.mkdir(exist_ok=True)
        replace_file(path, text.encode() + b"\n")
        for task, records in predictions.items():
            if records:
                write_predictions(workdir, task, records)
    except OSError as error:
        raise CheckpointError(
            f"{path} can't be written: {error.strerror}; the metrics are on standard output"
        ) from None
    finally:
        print(text)


def generate(options: argparse.Namespace, _) -> None:
    """`t5like generate`."""
    import jax

    from t5like.checkpoint import run_directory
    from t5like.cli import prompts
    from t5like.inference.generate import Generator
    from t5like.inference.sampling import DecodingOptions

    if options.prompt is not None and options.prompts_file:
        raise ConfigError("--prompt and --prompts_file can't both be given; use one")
    if options.output and not options.prompts_file:
        raise ConfigError(f"--output={options.output} needs --prompts_file; without it, predictions are printed")
    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(DecodingOptions)}
    decoding = DecodingOptions(**{**fields, "stop": tuple(options.stop)})
    rows = prompts.read_prompts(options.prompts_file) if options.prompts_file else []
    loaded = run_directory.load(expand(options.workdir).absolute(), options.step, all_devices=True)
    generator = Generator(loaded.config, loaded.params, loaded.tokenizer)
    generator.refuse_labels()
    with jax.set_mesh(loaded.mesh):
        if options.prompts_file:
            source = {"workdir": str(expand(options.workdir).absolute()), "step": loaded.step}
            prompts.generate_file(generator, decoding, options.prompts_file, rows, options.output, source)
        elif options.prompt is not None:
            prompts.print_prediction(generator, decoding, options.prompt)
        else:
            prompts.interactive(generator, decoding)


def predict(options: argparse.Namespace, _) -> None:
    """`t5like predict`."""
    from t5like.checkpoint import run_directory
    from t5like.cli import encoder_files

    loaded = run_directory.load(expand(options.workdir).absolute(), options.step, all_devices=True)
    encoder_files.predict(loaded, options.inputs, options.output)


def embed(options: argparse.Namespace, _) -> None:
    """`t5like embed`."""
    from t5like.checkpoint import run_directory
    from t5like.cli import encoder_files

    loaded = run_directory.load(expand(options.workdir).absolute(), options.step, all_devices=True)
    encoder_files.embed(loaded, options.inputs, options.output)


def import_hf(options: argparse.Namespace, _) -> None:
    """`t5like import --format=hf`."""
    from t5like.interop.huggingface.convert import import_run

    for line in import_run(expand(options.input), expand(options.workdir).absolute()):
        print(printable(line), flush=True)


def export_hf(options: argparse.Namespace, _) -> None:
    """`t5like export --format=hf`."""
    size = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(K|M|G)?B?", options.max_shard_size.upper())
    if not size or not 0 < float(size[1]) < 1e15:
        raise ConfigError(f"--max_shard_size={options.max_shard_size} must be a number of bytes; use 5GB or 500MB")
    from t5like.interop.huggingface.convert import export_run

    lines = export_run(
        expand(options.workdir).absolute(),
        expand(options.output).absolute(),
        step=options.step,
        family=options.family,
        dtype=options.dtype,
        max_shard_size=int(float(size[1]) * {None: 1, "K": 1e3, "M": 1e6, "G": 1e9}[size[2]]),
    )
    for line in lines:
        print(printable(line), flush=True)


def export_peft(options: argparse.Namespace, _) -> None:
    """`t5like export --format=peft`."""
    from t5like.interop.huggingface.peft_adapter import export_run

    workdir, output = expand(options.workdir).absolute(), expand(options.output).absolute()
    for line in export_run(workdir, output, step=options.step, family=options.family):
        print(printable(line), flush=True)


def import_t5x(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    """`t5like import --format=t5x`."""
    if not options.config:
        raise ConfigError(
            "--format=t5x needs --config: a T5X checkpoint has no config; use --config=configs/t5_small.py"
        )
    config = load_config(options, overrides)
    from t5like.interop.t5x import import_run

    for line in import_run(expand(options.input), expand(options.workdir).absolute(), config):
        print(printable(line), flush=True)


def export_stablehlo(options: argparse.Namespace, _) -> None:
    """`t5like export --format=stablehlo`."""
    from t5like.inference.sampling import DecodingOptions

    DecodingOptions(max_new_tokens=options.max_new_tokens, temperature=options.temperature)
    from t5like.interop.stablehlo import export_run

    for line in export_run(
        expand(options.workdir).absolute(),
        expand(options.output).absolute(),
        step=options.step,
        max_new_tokens=options.max_new_tokens,
        prompt_length=options.prompt_length,
        temperature=options.temperature,
    ):
        print(printable(line), flush=True)


def plan(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    """`t5like plan`."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # leaves an accelerator of this machine to other programs
    if options.quick and (options.keep or options.search):
        flag = f"--keep={options.keep}" if options.keep else f"--search={options.search}"
        remedy = "leave it out" if options.keep else "use --search"
        raise ConfigError(f"{flag} needs compiled programs, and --quick compiles none; {remedy}")
    if options.fake_devices is not None:
        raise ConfigError(f"--fake_devices={options.fake_devices} does not go with plan; use --topology=cpu:8")
    config = load_config(options, overrides)
    from t5like.plan import planner, report, topology

    machine = topology.parse(options.topology, options.num_slices)
    paths = [path and expand(path).absolute() for path in (options.workdir, options.keep)]
    plan_options = planner.PlanOptions(options.quick, options.search, options.tokens, options.price, *paths)
    result, errors = planner.make_plan(
        config, machine, plan_options, lambda line: print(printable(line), file=sys.stderr, flush=True)
    )
    print(json.dumps(result, indent=1) if options.json else report.text(result))
    if errors:  # after the plan, which contains the other results
        raise errors[0]


IMPORTS = {"hf": import_hf, "t5x": import_t5x}
EXPORTS = {"hf": export_hf, "peft": export_peft, "stablehlo": export_stablehlo}
COMMANDS = {  # and those of `cli.inspections`
    "train": train,
    "rl": rl,
    "configs": configs,
    "prepare": prepare,
    "evaluate": heldout,
    "generate": generate,
    "predict": predict,
    "embed": embed,
    "import": lambda options, overrides: IMPORTS[options.format](options, overrides),
    "plan": plan,
    "export": lambda options, overrides: EXPORTS[options.format](options, overrides),
}
