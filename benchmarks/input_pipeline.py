"""Speed of the input pipeline on one core, for every valid pair of objective and architecture but those of labels.

    python benchmarks/input_pipeline.py [--config=configs/tiny.py] [--config.SECTION.FIELD=VALUE ...] [--seconds=3]
                                        [--examples=task:summarization]

Prepares the config's data if needed, then generates batches of 128 rows of 512 and 114 tokens (set by flags) with
`Batches.at`, in one thread pinned to one core. Tokens are counted as the trainer counts them, without padding; times
are CPU seconds, because the core may be shared. Location is the share of the time that selects rows: the mixture and
the permutation of the epoch. Supervised rows are packed from --examples;
rows of labels are packed in the same way.

Prints a JSON line per case and, on standard error, a table in Markdown.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import get_args

import measurement
import numpy as np

from t5like.cli.flags import Parser
from t5like.config import checks, loader
from t5like.config.schema import ARCHITECTURES, Config, LabelObjective
from t5like.data import pipeline
from t5like.data.pipeline import Batches
from t5like.data.store import preparation
from t5like.data.tokenizers.vocabulary import Vocabulary
from t5like.errors import UserError
from t5like.optim.step import real_tokens

STEPS = 64  # whose batches are generated repeatedly
SHAPE = [("data.inputs_length", "512"), ("data.targets_length", "114"), ("data.batch_size", "128")]


def cases(config: Config, examples: str) -> Iterator[Config]:
    """The config with every valid combination of objective, architecture and cross-document attention."""
    texts = (pair for pair in ARCHITECTURES.items() if pair[0] not in get_args(LabelObjective))
    for objective, architectures in texts:
        supervised = objective == "supervised"
        cross_document = [False] if supervised else [True, False]
        for architecture in architectures:
            for cross in cross_document:
                data = dataclasses.replace(config.data, objective=(objective,), cross_document_attention=cross)
                model = dataclasses.replace(
                    config.model, architecture=architecture, token_types=2 * (objective == "mlm_nsp")
                )
                case = dataclasses.replace(config, data=data, model=model)
                if supervised:
                    case = dataclasses.replace(case, data=dataclasses.replace(data, source=(examples,)))
                checks.check(case)
                yield case


def cpu_seconds(function: Callable[[int], object], seconds: float) -> float:
    """CPU seconds of a call: the median over calls with 0, 1, 2, ... for so many seconds."""
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        begin = time.process_time()
        function(len(times) % STEPS)
        times.append(time.process_time() - begin)
    return float(np.median(times))


def measure(batches: Batches, seconds: float) -> dict[str, float | str]:
    """The speed of one case."""
    config = batches.config
    tokens = float(np.mean([real_tokens(batches.at(step)) for step in range(4)]))
    whole = cpu_seconds(batches.at, seconds)
    size = config.data.batch_size
    row_B = lambda step: np.arange(step * size, (step + 1) * size, dtype=np.uint64)
    location = cpu_seconds(lambda step: batches.locate(row_B(step)), seconds / 3)
    return {
        "objective": config.data.objective[0],
        "architecture": config.model.architecture,
        "borders": "concatenate" if config.data.cross_document_attention else "segments",
        "tokens_per_second": tokens / whole,
        "batch_ms": 1e3 * whole,
        "share_location": location / whole,
        "fill": tokens / (config.data.batch_size * config.row_length),
    }


def row(values: dict[str, float | str]) -> dict[str, float | str]:
    """The columns of the table."""
    return {
        **{key: values[key] for key in ("objective", "architecture", "borders")},
        "million tokens/s": values["tokens_per_second"] / 1e6,
        "batch ms": values["batch_ms"],
        "location %": 100 * values["share_location"],
    }


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Context in which this process runs on one of its cores."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def parse(arguments: list[str]) -> tuple[argparse.Namespace, Config]:
    """The options and the config of a command line."""
    parser = Parser(prog="input_pipeline.py", description="Measure finished batches on one core.", allow_abbrev=False)
    parser.add_argument("--config", default="configs/tiny.py", metavar="FILE")
    parser.add_argument("--examples", default="task:summarization", metavar="SOURCE", help="of the supervised rows")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="X", help="of batches per case")
    rest, overrides = measurement.split(arguments)
    options = parser.parse_args(rest)
    return options, loader.load(options.config, [*SHAPE, *overrides])


def main(arguments: list[str]) -> None:
    """Run the benchmark of the command line."""
    options, config = parse(arguments)
    prepared = preparation.prepare(config)
    trained = dataclasses.replace(config.tokenizer, path=str(prepared.tokenizer_path))
    config = dataclasses.replace(config, tokenizer=trained)
    vocabulary = Vocabulary.of(prepared.tokenizer)
    measurement.emit(
        **measurement.machine("numpy"),
        stored_tokens=sum(store.split("train").num_tokens for store in prepared.stores),
        rows=config.data.batch_size,
        inputs=config.data.inputs_length,
        targets=config.data.targets_length,
    )
    rows = []
    for case in cases(config, options.examples):
        stores = preparation.prepare(case).stores
        with one_core():
            values = measure(Batches(case, vocabulary, pipeline.open_split(case, stores, "train")), options.seconds)
        measurement.emit(**values)
        rows.append(row(values))
    print(f"\n{measurement.table(rows)}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"input_pipeline.py: {error}")
