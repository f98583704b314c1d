"""The commands and their flags, and how a command line is parsed. `cli.main` calls `parse`; `cli.commands` runs it."""

import argparse
import functools
import re
from collections.abc import Callable, Sequence

from t5like import __version__
from t5like.cli import inspection_flags
from t5like.cli.parser import Parser, add_command, parse_path, subcommands
from t5like.config.field_types import LARGEST, Range
from t5like.errors import ConfigError, shown

HF_FAMILIES = ("t5", "mt5", "umt5", "llama", "qwen3", "mistral", "gpt2", "bert", "modernbert", "eurobert")
HF_FAMILIES += ("gemma2", "gemma3_text", "t5gemma", "t5gemma2")
# The flags that only one format of a command takes, with their defaults.
FORMATS = {
    "import": {"hf": {}, "t5x": {"config": None}},
    "export": {
        "hf": {"family": None, "dtype": None, "max_shard_size": "5GB"},
        "peft": {"family": None},
        "stablehlo": {"max_new_tokens": 64, "prompt_length": None, "temperature": 0.0},
    },
}

CONTINUED = ("train", "rl", "compare-steps")  # commands that change fields of an existing run's config

# Range of each numeric flag, and a value that works. `inference.sampling.DecodingOptions` checks those of generate.
RANGES = {
    "fake_devices": (Range(1, 1024), 8),
    "step": (Range(0, LARGEST), 0),
    "overfit": (Range(1, 10_000), 1),
    "rows": (Range(1, 4096), 8),
    "limit": (Range(1, LARGEST), 5),
    "num_fewshot": (Range(0, 1000), 5),
    "prompt_length": (Range(1, 2**20), 64),
    "num_slices": (Range(1, 2**20), 2),
    "search": (Range(0, 1000), 2),
    "tokens": (Range(1, 1e30), "2e12"),
    "price": (Range(above=0, most=1e9), 1.2),
}


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Split a command line into options and config overrides, the pairs of ``--config.section.field=value``.

    Raises:
        ConfigError: a command, flag or value is unknown or out of range.
    """
    overrides, sides, rest = [], {"a": [], "b": []}, []
    for argument in arguments:
        if match := re.match(r"--(?:(a|b)\.)?config\.", argument):
            name, equals, value = argument[match.end() :].partition("=")
            if not equals:
                raise ConfigError(f"{argument} needs a value, as in {argument}=VALUE")
            (sides[match[1]] if match[1] else overrides).append((name, value))
        else:
            rest.append(argument)
    options = build_parser().parse_args(rest)
    for flag, (limits, use) in RANGES.items():
        value = getattr(options, flag, None)
        if value is not None and value not in limits:
            text = f"{value:g}" if isinstance(value, float) else shown(value)
            raise ConfigError(f"--{flag}={text} must be {limits}; use --{flag}={use}")
    resolve_format(options)
    options.sides = sides
    for side, values in sides.items():
        if values and options.command != "compare-steps":
            raise ConfigError(f"--{side}.config.{values[0][0]} is for compare-steps; use --config.{values[0][0]}")
    if overrides and not getattr(options, "config", None) and options.command not in CONTINUED:
        raise ConfigError(
            f"--config.{overrides[0][0]} can't be set for {options.command}: it takes the run's own config"
        )
    return options, overrides


def resolve_format(options: argparse.Namespace) -> None:
    """Refuse flags of another `--format`, and set the flags of this one to their defaults."""
    formats = FORMATS.get(options.command, {})
    own = formats[options.format] if formats else {}
    for flag, default in own.items():
        if getattr(options, flag) is None:
            setattr(options, flag, default)
    for name, flags in formats.items():
        for flag in flags:
            if flag not in own and getattr(options, flag) is not None:
                raise ConfigError(f"--{flag} goes with --format={name}, not --format={options.format}; leave it out")


def build_parser() -> Parser:
    """All commands and their flags."""
    parser = Parser(prog="t5like", description="Pretrain T5-like language models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"t5like {__version__}")
    parser.knows_all_flags = True
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    command = functools.partial(add_command, commands)
    for add in (
        _add_train,
        _add_rl,
        _add_configs,
        _add_prepare,
        _add_evaluate,
        _add_generate,
        _add_predict,
        _add_embed,
        inspection_flags.add_replay,
        _add_import,
        _add_export,
        _add_plan,
        inspection_flags.add_inspect,
        inspection_flags.add_compare,
        inspection_flags.add_compare_steps,
    ):
        add(command)
    sub = command("completion", "Print a script that completes commands, flags, config fields and values.")
    sub.add_argument("shell", choices=("bash", "zsh"))
    text = "Submit a command as a job to Slurm, Kubernetes, TPU VMs or processes of this machine."
    commands.add_parser("launch", help=text, add_help=False)  # parsed by `launch.options`
    return parser


def commands_with_workdir() -> list[str]:
    """The commands that take a run directory, in the order of the help."""
    commands = subcommands(build_parser())
    takes = lambda sub: "--workdir" in sub.format_usage() or any(map(takes, subcommands(sub).values()))
    return [name for name, sub in commands.items() if takes(sub)]


def _add_train(command: Callable[[str, str], Parser]) -> None:
    sub = command("train", "Train a model; the same command again continues the run.")
    _add_run_flags(sub)
    sub.add_argument(
        "--overfit",
        action=_WithoutWorkdir,
        type=int,
        metavar="K",
        help="only train on the first K batches again and again, and say whether the loss gets to its floor and what "
        "keeps it from there; writes nothing and needs no --workdir",
    )
    sub.add_argument(
        "--debug_nan",
        action="store_true",
        help="end at the first step with a value that is not finite, and name the layer and operation it comes from",
    )


def _add_rl(command: Callable[[str, str], Parser]) -> None:
    sub = command("rl", "Train a model by rewards, or from pairs of answers; the same command continues the run.")
    _add_run_flags(sub)
    sub.add_argument(
        "--audit", action="store_true", help="score right, empty and junk answers by the rewards, without training"
    )


class _WithoutWorkdir(argparse.Action):
    """Stores a value, and makes --workdir optional."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, values)
        for action in parser._actions:
            action.required = action.required and action.dest != "workdir"


def _add_run_flags(sub: Parser) -> None:
    sub.shows_fields = True
    sub.add_argument(
        "--config",
        metavar="FILE",
        help="a preset (t5like configs lists them), a Python config file, or a run's config.json; default: the config "
        "of the run in --workdir; --config.SECTION.FIELD=VALUE sets a field",
    )
    sub.add_argument("--workdir", required=True, type=parse_path, metavar="RUN", help="the run directory")
    sub.add_argument(
        "--allow_change",
        action="append",
        default=[],
        metavar="FIELD[,FIELD]",
        help="fields that may change from here on when a run continues, such as optimizer.learning_rate; data: the "
        "texts of a source; may be repeated",
    )
    add_process_flags(sub)


def _add_configs(command: Callable[[str, str], Parser]) -> None:
    command("configs", "List the presets that --config takes by name.")


def _add_prepare(command: Callable[[str, str], Parser]) -> None:
    sub = command("prepare", "Build the tokenizer and the token store, without training.")
    sub.add_argument("--config", required=True, metavar="FILE")
    sub.add_argument(
        "--workdir", type=parse_path, metavar="RUN", help="also write config and tokenizer to a run directory"
    )


def _add_evaluate(command: Callable[[str, str], Parser]) -> None:
    sub = command("evaluate", "Print and write a run's held-out metrics, or those of public tasks, as JSON.")
    sub.add_argument("--workdir", required=True, type=parse_path, metavar="RUN")
    sub.add_argument("--step", type=int, metavar="N", help="step of the checkpoint; default: the latest")
    sub.add_argument(
        "--tasks", metavar="NAME[,NAME]", help="tasks of lm-evaluation-harness (pip install 't5like[harness]')"
    )
    sub.add_argument(
        "--tasks_dir",
        type=parse_path,
        metavar="DIR",
        help="YAML files of more tasks; their relative paths start in DIR",
    )
    sub.add_argument("--limit", type=int, metavar="N", help="evaluate only the first N examples of each task")
    sub.add_argument("--num_fewshot", type=int, metavar="N", help="number of few-shot examples in each prompt")
    add_process_flags(sub)


def _add_generate(command: Callable[[str, str], Parser]) -> None:
    sub = command("generate", "Generate continuations of prompts, or fill their <extra_id_N> spans.")
    sub.add_argument("--workdir", required=True, type=parse_path, metavar="RUN")
    sub.add_argument("--step", type=int, metavar="N", help="step of the checkpoint; default: the latest")
    sub.add_argument(
        "--prompt", metavar="TEXT", help="one prompt; without it and --prompts_file, each line of standard input is one"
    )
    sub.add_argument("--prompts_file", type=parse_path, metavar="F", help='JSON lines with the field "prompt"')
    sub.add_argument(
        "--output",
        type=parse_path,
        metavar="F",
        help="write the rows with predictions here; the same command again continues an interrupted one",
    )
    for name, kind, default, text in (
        ("max_new_tokens", int, 64, "maximum number of generated tokens"),
        ("temperature", float, 0.0, "softmax temperature; 0: greedy decoding"),
        ("top_k", int, 0, "sample from the k most likely tokens; 0: all"),
        ("top_p", float, 1.0, "sample from the most likely tokens whose probabilities sum to this"),
        ("min_p", float, 0.0, "sample from tokens with at least this fraction of the highest probability"),
        ("repetition_penalty", float, 1.0, "above 1: tokens that occurred already become less likely"),
        ("num_beams", int, 1, "beams of beam search; 1: no beam search"),
        ("length_penalty", float, 1.0, "a beam's log-probability is divided by length ** this"),
        ("num_returned", int, 1, "predictions per prompt: the best beams, or samples"),
        ("seed", int, 0, "random seed of sampling"),
    ):
        sub.add_argument(f"--{name}", type=kind, default=default, metavar="N" if kind is int else "X", help=text)
    sub.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="stop generating at this text; may be repeated"
    )


def _add_predict(command: Callable[[str, str], Parser]) -> None:
    sub = command(
        "predict", "Predict labels of texts, with a model of classification or regression, or labels of words."
    )
    _add_encoder_flags(sub)
    sub.add_argument("--output", type=parse_path, metavar="F", help="JSON lines to write; default: standard output")


def _add_embed(command: Callable[[str, str], Parser]) -> None:
    sub = command("embed", "Write embeddings of texts: the mean of the encoder's output over the tokens of each text.")
    _add_encoder_flags(sub)
    text = "F.npy: an array with a row for each text; F.jsonl: JSON lines"
    sub.add_argument("--output", required=True, type=parse_path, metavar="F", help=text)


def _add_encoder_flags(sub: Parser) -> None:
    sub.add_argument("--workdir", required=True, type=parse_path, metavar="RUN")
    sub.add_argument("--step", type=int, metavar="N", help="step of the checkpoint; default: the latest")
    text = "a text in each line, of pairs two with a tab between them; default: standard input"
    sub.add_argument("--inputs", type=parse_path, metavar="F", help=text)


def _add_import(command: Callable[[str, str], Parser]) -> None:
    sub = command("import", "Convert a checkpoint of another library to a run.")
    sub.add_argument(
        "--format",
        required=True,
        choices=FORMATS["import"],
        help="hf: a Hugging Face directory; t5x: a checkpoint of T5X, with --config for its model",
    )
    sub.add_argument("--input", required=True, type=parse_path, metavar="DIR")
    sub.add_argument("--workdir", required=True, type=parse_path, metavar="RUN", help="the run directory to create")
    sub.add_argument(
        "--config", metavar="FILE", help="t5x: config with the model and tokenizer.path; --config.SECTION.FIELD=VALUE"
    )


def _add_export(command: Callable[[str, str], Parser]) -> None:
    sub = command("export", "Convert a run's model to the format of another library.")
    sub.add_argument(
        "--format",
        required=True,
        choices=FORMATS["export"],
        help="hf: a Hugging Face directory; peft: adapters of a LoRA run; stablehlo: programs for cpu, cuda and tpu",
    )
    sub.add_argument("--workdir", required=True, type=parse_path, metavar="RUN")
    sub.add_argument(
        "--output", required=True, type=parse_path, metavar="DIR", help="a directory that is empty or does not exist"
    )
    sub.add_argument("--step", type=int, metavar="N", help="step of the checkpoint; default: the latest")
    sub.add_argument("--family", choices=HF_FAMILIES, help="hf, peft: model family; default: by the config")
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="hf: dtype of the weights")
    sub.add_argument(
        "--max_shard_size", metavar="SIZE", help="hf: maximum size of a weight file, such as 500MB; default: 5GB"
    )
    sub.add_argument(
        "--max_new_tokens", type=int, metavar="N", help="stablehlo: tokens that generate returns; default: 64"
    )
    sub.add_argument(
        "--prompt_length", type=int, metavar="N", help="stablehlo: tokens that generate reads; default: as in training"
    )
    sub.add_argument(
        "--temperature",
        type=float,
        metavar="X",
        help="stablehlo: temperature of generate; 0, the default: greedy decoding",
    )


def _add_plan(command: Callable[[str, str], Parser]) -> None:
    sub = command("plan", "Predict memory, time, network traffic and cost of a run on another machine.")
    sub.add_argument("--config", required=True, metavar="FILE")
    sub.add_argument("--topology", required=True, metavar="NAME", help="v5e:16x16, v5p:8x8x8, v6e:8x8, v4:4x4x8, cpu:8")
    sub.add_argument("--num_slices", type=int, default=1, metavar="N", help="number of slices of that topology")
    sub.add_argument("--json", action="store_true", help="print JSON instead of tables")
    sub.add_argument("--quick", action="store_true", help="estimate in seconds, without compiling")
    sub.add_argument(
        "--search",
        type=int,
        nargs="?",
        const=0,
        metavar="N",
        help="search meshes, remat policies and microbatches; compile the N fastest",
    )
    sub.add_argument(
        "--tokens", type=float, metavar="N", help="training tokens, such as 2e12; default: those of train.num_steps"
    )
    sub.add_argument("--price", type=float, metavar="X", help="price of one chip for one hour")
    sub.add_argument("--workdir", type=parse_path, metavar="RUN", help="check that this run directory can be written")
    sub.add_argument("--keep", type=parse_path, metavar="DIR", help="keep the compiled programs there")


def add_process_flags(command: Parser) -> None:
    """Add the flags for several processes without a launcher, or with other values than those of the launcher."""
    command.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, to run several processes")
    command.add_argument(
        "--num_processes", metavar="N", help="number of processes of the run; 1: run alone, even under a launcher"
    )
    command.add_argument("--process_id", metavar="I", help="rank of this process, from 0")
