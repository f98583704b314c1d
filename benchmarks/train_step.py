"""Speed of the full training step of any config on this machine's devices, without data.

    python benchmarks/train_step.py --config=configs/tiny.py [--config.SECTION.FIELD=VALUE ...] [--steps=20] [--profile]
    python benchmarks/train_step.py --shape=tiny [--steps=20] [--profile]    # a shape of peers.py instead of a config

The step is the trainer's own (`t5like.optim.step`), started as by the trainer; tokens are random and go through the
config's objective. Prints three JSON lines: the machine; the cost of the start (from process start to the first
finished step, tracing, compilation; the latter two run concurrently with the initialization of the state, as in
`train`); the speed (tokens/s as the trainer counts them, MFU against `metrics.flops.peak_flops`, peak memory). With
the option "profile", standard error gets where the time of three more steps goes, by kind of operation.

Compiled programs are cached, so the first start is slower than later ones; JAX_ENABLE_COMPILATION_CACHE=false disables
the cache. `peers.py` runs this file with --serve (see `measurement`).
"""

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import measurement
import peers

from t5like.cli.flags import Parser
from t5like.cli.main import start_devices
from t5like.config import loader
from t5like.errors import UserError
from t5like.metrics import flops
from t5like.optim import train_state
from t5like.sharding import allocator, auto, placement

if TYPE_CHECKING:
    from collections.abc import Sequence

    import jax

    from t5like.config.schema import Config
    from t5like.data.pipeline import Batches


class RandomText:
    """An infinite text of random ids in documents of 300 tokens, with the interface of `Stream`."""

    num_tokens, num_documents = 2**24, 2**24 // 300

    def __init__(self, config: "Config"):
        self._ids = config.tokenizer.vocab_size - config.tokenizer.num_sentinels - 3

    def windows(self, starts_N, length):
        import numpy as np

        from t5like.data.randomness import random_bits

        places_N = (starts_N[:, None] + np.arange(length)).astype(np.uint64).reshape(-1)
        return (3 + random_bits(places_N, 1) % np.uint64(self._ids)).astype(np.int32).reshape(-1, length)

    def segments(self, starts_N, length):
        import numpy as np

        documents_NL = (starts_N[:, None] + np.arange(length)) // 300
        return (documents_NL - documents_NL[:, :1] + 1).astype(np.int32)

    def documents(self, places_N):
        begin_N = places_N // 300 * 300
        return begin_N, begin_N + 299


def random_batches(config: "Config") -> "Batches":
    """The batches of the config's objectives on `RandomText`."""
    import numpy as np

    from t5like.data.pipeline import Batches
    from t5like.data.tokenizers.vocabulary import Vocabulary

    size, count = config.tokenizer.vocab_size, config.tokenizer.num_sentinels
    text_V = (np.arange(size) >= 3) & (np.arange(size) < size - count)
    vocabulary = Vocabulary(1, np.arange(size - 1, size - count - 1, -1, dtype=np.int32), text_V, text_V)
    return Batches(config, vocabulary, [RandomText(config)] * len(config.data.source))


class Trainer:
    """A model in training, initialized and run as in `train`.

    Attributes:
        batch: read by every step; may be replaced between steps.
        compiled: the program of a step.
        flops: of a step, without recomputation.
        metrics: of the last step.
        start: cost of the start.
    """

    def __init__(self, config: "Config", devices: "Sequence[jax.Device] | None" = None):
        """Initialize the state and compile the step, for all devices by default."""
        import jax

        from t5like import tree
        from t5like.data import pipeline
        from t5like.optim import step
        from t5like.sharding import mesh as meshes

        self._block, self._to_global = jax.block_until_ready, placement.to_global
        self.mesh = meshes.make_mesh(config, devices)
        self.config = config = auto.resolve_auto(config, self.mesh)
        self.batch, shape = random_batches(config).at(0), pipeline.spec(config)
        abstract = train_state.abstract_state(config, shape, self.mesh)
        self.flops, self.start = flops.model_flops(config), {"imports_s": measurement.since_start()}

        def compile_step():
            begin = time.perf_counter()
            lowered = step.lower_train_step(config, shape, abstract)
            middle = time.perf_counter()
            with allocator.trimmed():  # as in `step.compile_train_step`
                compiled = lowered.compile()
            self.start |= {"lower_s": middle - begin, "compile_s": time.perf_counter() - middle}
            return compiled

        with ThreadPoolExecutor(1) as pool:
            compiling = pool.submit(compile_step)
            self.state = train_state.new_state(config, shape, abstract)
            self.compiled = compiling.result()
        self.start["params"] = tree.num_parameters(abstract.params)

    def run(self, count: int) -> list[float]:
        """Seconds of each of `count` steps. On accelerators a step is dispatched before the previous one is done."""
        seconds, waiting, begin = [], [], time.perf_counter()
        ahead = 0 if self.mesh.devices.flat[0].platform == "cpu" else 1
        for left in reversed(range(count)):
            rows = self._to_global(self.batch, self.mesh, self.config.data.batch_size)
            self.state, values = self.compiled(self.state, rows)
            waiting.append(values)
            while len(waiting) > min(ahead, left):
                self.metrics = self._block(waiting.pop(0))
                now = time.perf_counter()
                seconds.append(now - begin)
                begin = now
        self._block(self.state)
        return seconds


def profile(trainer: Trainer) -> None:
    """Print to standard error where the time of three steps goes."""
    from t5like.metrics.profiler import Profiler
    from t5like.train import profile_summary

    show = lambda line: print(line, file=sys.stderr)
    with tempfile.TemporaryDirectory() as directory:
        recorder = Profiler(Path(directory), 1, profile_summary.explain(trainer.compiled, show))
        for number in range(1, 5):
            recorder.before(number)
            trainer.run(1)
        recorder.stop()


def parse(arguments: list[str]) -> tuple[argparse.Namespace, "Config"]:
    """The options and the config of a command line."""
    parser = Parser(prog="train_step.py", description="Measure the training step of a config.", allow_abbrev=False)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config", metavar="FILE", help="--config.SECTION.FIELD=VALUE changes a field")
    model.add_argument("--shape", choices=list(peers.SHAPES), help="a shape of peers.py")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="timed steps, after 2 that are not")
    parser.add_argument("--fake_devices", type=int, default=None, metavar="N", help="N CPU devices in this process")
    parser.add_argument("--profile", action="store_true", help="print where the time of a step goes")
    parser.add_argument("--serve", action="store_true", help="read numbers of steps from standard input and time them")
    rest, overrides = measurement.split(arguments)
    options = parser.parse_args(rest)
    if options.shape:
        config, *fields = peers.t5like_command(peers.SHAPES[options.shape], peers.parse([]))[3:]
        options.config, overrides = config.partition("=")[2], measurement.split(fields)[1] + overrides
    return options, loader.load(options.config, overrides)


def main(arguments: list[str]) -> None:
    """Run the benchmark of the command line."""
    options, config = parse(arguments)
    start_devices(options.fake_devices)
    allocator.keep_freed()  # as in `t5like train`
    trainer = Trainer(config)
    [first] = trainer.run(1)
    start_to_first_step = measurement.since_start()
    import jax

    values = {name: float(value.mean()) for name, value in trainer.metrics.items()}
    measurement.emit(
        **measurement.machine("jax", "jaxlib", "numpy"),
        devices=len(jax.devices()),
        device=jax.devices()[0].device_kind,
        dtype=trainer.config.model.dtype,
    )
    measurement.emit(
        peer="t5like",
        first_step_s=first,
        start_to_first_step_s=start_to_first_step,
        **trainer.start,
        flops_per_step=trainer.flops,
        tokens_per_step=values["tokens"],
        loss=values["loss"],
    )
    if options.serve:
        measurement.serve(trainer.run)
        memory = measurement.peak_memory_mb()
        peak = flops.peak_flops(trainer.mesh.devices.flatten())
        measurement.emit(peak_rss_mb=memory, matmul_gflops=peak and peak / 1e9)
        return
    trainer.run(2)
    times = measurement.time_steps(trainer.run, options.steps)
    speed = measurement.summary(times["step_ms"], values["tokens"])
    memory = measurement.peak_memory_mb()  # before the matmul rate is measured
    peak = flops.peak_flops(trainer.mesh.devices.flatten())
    achieved = trainer.flops / speed["step_ms"] * 1e3
    device_bytes = [(d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in trainer.mesh.local_devices]
    measurement.emit(
        **speed,
        cpu_ms=times["cpu_ms"],
        flops_per_second=achieved,
        peak_flops=peak,
        mfu=peak and achieved / peak,
        peak_rss_mb=memory,
        peak_device_mb=max(device_bytes) // 2**20 or None,
    )
    if options.profile:
        profile(trainer)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"train_step.py: {error}")
