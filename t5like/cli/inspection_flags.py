"""The flags of the commands that look at runs and configs: `inspect`, `compare`, `compare-steps`, `replay`."""

import argparse
from collections.abc import Callable

from t5like.cli.parser import Parser, add_command, parse_path


def add_replay(command: Callable[[str, str], Parser]) -> None:
    sub = command("replay", "Run one step of a run again on one device; name the first operation that is not finite.")
    sub.add_argument("--workdir", required=True, type=parse_path, metavar="RUN")
    sub.add_argument("--step", required=True, type=int, metavar="N", help="update N: the one that made N - 1 steps N")


def add_inspect(command: Callable[[str, str], Parser]) -> None:
    parser = command("inspect", "Show what a run consists of.")
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT", parser_class=Parser)
    sub = add_command(subjects, "checkpoint", "List a run's checkpoints: steps, sizes, dates, and which are good.")
    sub.add_argument("--workdir", required=True, type=parse_path, metavar="RUN")
    sub.add_argument("--verify", action="store_true", help="read all arrays and compare them with their digests")
    _add_inspect_data(subjects)
    _add_inspect_model(subjects)
    sub = add_command(subjects, "run", "Say whether a run is healthy, and show what happened in it.")
    sub.add_argument("--workdir", required=True, type=parse_path, metavar="RUN")
    sub.add_argument("--verify", action="store_true", help="read all checkpoints and compare them with their digests")
    sub.add_argument("--html", type=parse_path, metavar="FILE", help="also write one page with plots")


def _add_inspect_data(subjects: "argparse._SubParsersAction[Parser]") -> None:
    text = "Show the rows of a step token by token, statistics of the sources, and warnings."
    sub = add_command(subjects, "data", text)
    _add_config_or_run(sub)
    sub.add_argument("--step", type=int, default=1, metavar="N", help="update N, from 1; default: 1")
    sub.add_argument("--rows", type=int, default=8, metavar="N", help="number of rows to show; default: 8")
    sub.add_argument("--html", type=parse_path, metavar="FILE", help="also write a page of HTML")
    sub.add_argument("--json", action="store_true", help="print JSON instead of text")


def _add_inspect_model(subjects: "argparse._SubParsersAction[Parser]") -> None:
    text = "Show every parameter: shape, axes, split, bytes, initial values, optimizer; totals and FLOPs by part."
    sub = add_command(subjects, "model", text)
    _add_config_or_run(sub)
    sub.add_argument("--topology", metavar="NAME", help="v5e:16x16, h100:4x8, cpu:8; default: the mesh of the config")
    sub.add_argument("--num_slices", type=int, default=1, metavar="N", help="number of slices of that topology")
    sub.add_argument("--html", type=parse_path, metavar="FILE", help="also write a page of HTML")
    sub.add_argument("--json", action="store_true", help="print JSON instead of text")


def _add_config_or_run(sub: Parser) -> None:
    sub.add_argument("--config", metavar="FILE", help="a config; --config.SECTION.FIELD=VALUE sets a field")
    sub.add_argument("--workdir", type=parse_path, metavar="RUN", help="or a run directory")


def add_compare(command: Callable[[str, str], Parser]) -> None:
    sub = command("compare", "Compare runs: config fields that differ, metrics, and loss curves in one picture.")
    sub.add_argument(
        "runs", nargs="+", type=parse_path, metavar="RUN", help="run directories, or a sweep's directory of runs"
    )
    sub.add_argument("--output", type=parse_path, metavar="FILE", help="the picture, PNG; default: compare.png")
    sub.add_argument("--json", action="store_true", help="print JSON instead of tables")


def add_compare_steps(command: Callable[[str, str], Parser]) -> None:
    text = "Compare one training step under two settings, tensor by tensor: --a.config.FIELD=V and --b.config.FIELD=V "
    sub = command("compare-steps", text + "set a field of one side, --config.FIELD=V one of both.")
    sub.add_argument("a", metavar="A", help="a config, a run directory, or a file of --output")
    sub.add_argument("b", nargs="?", metavar="B", help="the same; default: A, with other fields")
    sub.add_argument(
        "--step", type=int, metavar="N", help="update N; default: 1, of a run the one after its checkpoint"
    )
    sub.add_argument("--python", metavar="FILE", help="interpreter whose t5like makes the step of B: another commit's")
    sub.add_argument(
        "--output",
        type=parse_path,
        metavar="F",
        help="only write the tensors of A to F.npz, for a comparison elsewhere",
    )
