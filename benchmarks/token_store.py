"""Speed of writing and reading the token store, compared with plain SentencePiece on the same texts.

    python benchmarks/token_store.py [--config=configs/tiny.py] [--config.SECTION.FIELD=VALUE ...] [--rounds=5]

Prepares the config's data if needed. Then it measures alternately in one process: SentencePiece's `encode` of the
training texts in memory, in one call and one thread; and `prepare` of a new store with the same tokenizer and one
worker, which reads the documents, hashes, splits, encodes, writes, checksums and syncs. `prepare` runs once with the
config's own source, and once with JSON lines that repeat the same texts eight times and have larger shards. The ratio
of tokens per CPU second is the cost of the store in addition to tokenization. Reading: random windows of the store with
the document indices of their tokens, in one thread; the store is in the page cache.

Prints a JSON line per measurement. Times are CPU seconds, because the cores may be shared. A pass over the texts is one
round; results are medians over rounds.
"""

import argparse
import dataclasses
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import measurement
import numpy as np
import sentencepiece

from t5like.cli.flags import Parser
from t5like.config import loader
from t5like.config.schema import Config
from t5like.data.sources.source import open_source
from t5like.data.store import preparation
from t5like.errors import UserError

COPIES = 8  # of the texts, as JSON lines
ROWS, LENGTH = 1024, 568  # windows per call, and tokens per window: span corruption turns 568 into 512


def cpu_seconds(function: Callable[[], object]) -> float:
    """CPU seconds of a call in this process."""
    begin = time.process_time()
    function()
    return time.process_time() - begin


def measure_making(config: Config, prepared: preparation.Prepared, rounds: int) -> Iterator[dict[str, float | str]]:
    """Tokens per CPU second of bare SentencePiece and of `prepare` from two types of sources, alternately."""
    sources = [open_source(spec, config.data) for spec in config.data.source]
    texts = [source[number] for source in sources for number in range(len(source))]
    bare = sentencepiece.SentencePieceProcessor(model_proto=prepared.tokenizer.model_bytes)
    tokens = sum(map(len, bare.encode(texts, num_threads=1)))
    tokenizer = dataclasses.replace(config.tokenizer, path=str(prepared.tokenizer_path))
    with tempfile.TemporaryDirectory() as scratch:
        lines = Path(scratch) / "texts.jsonl"
        lines.write_text(COPIES * "".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
        cases = {
            name: dataclasses.replace(config.data, source=source, cache_directory=f"{scratch}/{name}", num_workers=1)
            for name, source in (("own", config.data.source), ("jsonl", (f"jsonl:{lines}",)))
        }
        bare_seconds, seconds = [], {name: [] for name in cases}
        for _ in range(rounds):
            bare_seconds.append(cpu_seconds(lambda: bare.encode(texts, num_threads=1)))
            for name, data in cases.items():
                (directory := Path(data.cache_directory)).mkdir()
                (directory / "tfds").symlink_to(Path(config.data.cache_directory).expanduser() / "tfds")
                again = dataclasses.replace(config, tokenizer=tokenizer, data=data)
                seconds[name].append(cpu_seconds(lambda config=again: preparation.prepare(config, progress=False)))
                shutil.rmtree(directory)
    for name, copies in (("own", 1), ("jsonl", COPIES)):
        yield {
            "measure": "making",
            "source": config.data.source[0] if name == "own" else "jsonl",
            "documents": copies * len(texts),
            "tokens": copies * tokens,
            "sentencepiece_tokens_per_second": tokens / statistics.median(bare_seconds),
            "prepare_tokens_per_second": copies * tokens / statistics.median(seconds[name]),
            "ratio": statistics.median(copies * b / s for b, s in zip(bare_seconds, seconds[name], strict=True)),
        }


def measure_reading(prepared: preparation.Prepared, rounds: int) -> dict[str, float | int]:
    """Tokens per CPU second of random windows from the largest store."""
    stream = max((store.split("train") for store in prepared.stores), key=lambda stream: stream.num_tokens)
    starts_N = np.random.default_rng(0).integers(0, stream.num_tokens, ROWS)
    windows = [cpu_seconds(lambda: stream.windows(starts_N, LENGTH)) for _ in range(10 * rounds)]
    segments = [cpu_seconds(lambda: stream.segments(starts_N, LENGTH)) for _ in range(10 * rounds)]
    return {
        "measure": "reading",
        "stored_tokens": stream.num_tokens,
        "window_tokens": LENGTH,
        "windows_tokens_per_second": ROWS * LENGTH / statistics.median(windows),
        "segments_tokens_per_second": ROWS * LENGTH / statistics.median(segments),
    }


def parse(arguments: list[str]) -> tuple[argparse.Namespace, Config]:
    """The options and the config of a command line."""
    parser = Parser(prog="token_store.py", description="Measure the token store.", allow_abbrev=False)
    parser.add_argument("--config", default="configs/tiny.py", metavar="FILE")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    rest, overrides = measurement.split(arguments)
    options = parser.parse_args(rest)
    return options, loader.load(options.config, overrides)


def main(arguments: list[str]) -> None:
    """Run the benchmark of the command line."""
    options, config = parse(arguments)
    prepared = preparation.prepare(config)
    measurement.emit(**measurement.machine("numpy", "sentencepiece"))
    measurement.emit(**measure_reading(prepared, options.rounds))
    for values in measure_making(config, prepared, options.rounds):
        measurement.emit(**values)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"token_store.py: {error}")
