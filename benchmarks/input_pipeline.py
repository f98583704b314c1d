"""Speed of finished batches on one core, for every objective and architecture that the config allows.

    python benchmarks/input_pipeline.py [--config=configs/tiny.py] [--config.SECTION.FIELD=VALUE ...] [--seconds=3]

Prepares the config's data if that is not done yet, then makes batches of 128 rows of 512 and 114 tokens (other values
by flags) with `Batches.at`, in one thread pinned to one core. Tokens are those that the model reads, as the trainer
counts them; times are CPU seconds, since the core may be shared. The objective alone, and the shares of a batch's time
that go into finding rows (location), reading windows and the objective, come from timing these parts on the same steps.

Prints a JSON line per case and, on standard error, a table in Markdown.
"""

import dataclasses
import itertools
import os
import sys
import time
import typing
from collections.abc import Callable, Iterator

import measurement
import numpy as np

from t5like import config as configs
from t5like.config import Config, DataConfig, ModelConfig
from t5like.data import corpus
from t5like.data.objectives import OBJECTIVES, Vocabulary
from t5like.data.pipeline import CORRUPTION, Batches
from t5like.errors import ConfigError, UserError
from t5like.main import Parser
from t5like.types import Batch

STEPS = 64  # whose parts are prepared for timing each part alone
SHAPE = [("data.inputs_length", "512"), ("data.targets_length", "114"), ("data.batch_size", "128")]


def cases(config: Config) -> Iterator[Config]:
    """The config with every objective, architecture and treatment of document borders that go together."""
    choices = [
        typing.get_args(typing.get_type_hints(cls)[name])
        for cls, name in [(DataConfig, "objective"), (ModelConfig, "architecture"), (DataConfig, "document_borders")]
    ]
    for objective, architecture, borders in itertools.product(*choices):
        case = dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, objective=objective, document_borders=borders),
            model=dataclasses.replace(config.model, architecture=architecture),
        )
        try:
            configs.check(case)
        except ConfigError:
            continue
        yield case


def cpu_seconds(function: Callable[[int], object], seconds: float) -> float:
    """CPU seconds of a call: the median over calls with 0, 1, 2, ... for so many seconds."""
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        begin = time.process_time()
        function(len(times))
        times.append(time.process_time() - begin)
    return float(np.median(times))


def measure(batches: Batches, seconds: float) -> dict[str, float | str]:
    """The speed of one case and where its time goes."""
    config, size = batches.config, batches.config.data.batch_size
    objective = OBJECTIVES[config.data.objective]

    def locate(step: int) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        row_B = np.arange(step * size, (step + 1) * size, dtype=np.uint64)
        return batches._bits(CORRUPTION, row_B), batches._locate(row_B)

    keys, places = zip(*map(locate, range(STEPS)), strict=True)
    windows = [batches._read(*place) for place in places]
    whole = cpu_seconds(batches.at, seconds)
    finding = cpu_seconds(locate, seconds / 3)
    reading = cpu_seconds(lambda step: batches._read(*places[step % STEPS]), seconds / 3)
    alone = cpu_seconds(
        lambda step: objective(config, batches.vocabulary, *windows[step % STEPS], keys[step % STEPS]), seconds / 3
    )
    tokens = _real_tokens(batches.at(0))
    return {
        "objective": config.data.objective,
        "architecture": config.model.architecture,
        "borders": config.data.document_borders,
        "tokens_per_second": tokens / whole,
        "text_tokens_per_second": size * batches.window.stride / whole,
        "batch_ms": 1e3 * whole,
        "objective_alone_tokens_per_second": tokens / alone,
        "share_location": finding / whole,
        "share_reading": reading / whole,
        "share_objective": alone / whole,
    }


def _real_tokens(batch: Batch) -> int:
    """What the model reads, as `step` counts it."""
    decoder = batch.weights_BL.size if batch.prefix_BL is not None else np.count_nonzero(batch.weights_BL)
    return decoder + (0 if batch.encoder_BS is None else np.count_nonzero(batch.encoder_BS))


def row(r: dict[str, float | str]) -> dict[str, float | str]:
    """The columns of the table."""
    return {
        **{key: r[key] for key in ("objective", "architecture", "borders")},
        "million tokens/s": r["tokens_per_second"] / 1e6,
        "of text": r["text_tokens_per_second"] / 1e6,
        "batch ms": r["batch_ms"],
        "objective alone": r["objective_alone_tokens_per_second"] / 1e6,
        "location %": 100 * r["share_location"],
        "reading %": 100 * r["share_reading"],
        "objective %": 100 * r["share_objective"],
    }


def main() -> None:
    parser = Parser(prog="input_pipeline.py", description="Measure finished batches on one core.", allow_abbrev=False)
    parser.add_argument("--config", default="configs/tiny.py", metavar="FILE")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="X", help="of batches per case")
    arguments, overrides = measurement.split(sys.argv[1:])
    options = parser.parse_args(arguments)
    config = configs.load(options.config, [*SHAPE, *overrides])
    prepared = corpus.prepare(config)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    vocabulary = Vocabulary(prepared.tokenizer.eos_id, prepared.tokenizer.sentinel_ids)
    streams = [store.split("train") for store in prepared.stores]
    measurement.emit(
        **measurement.machine("numpy"),
        stored_tokens=sum(stream.num_tokens for stream in streams),
        rows=config.data.batch_size,
        inputs=config.data.inputs_length,
        targets=config.data.targets_length,
    )
    rows = []
    for case in cases(config):
        values = measure(Batches(case, vocabulary, streams), options.seconds)
        measurement.emit(**values)
        rows.append(row(values))
    print(f"\n{measurement.table(rows)}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"input_pipeline.py: {error}")
