"""Cost of saving checkpoints: how long a save stalls the loop, and what it adds to the training steps during it.

    python benchmarks/saving.py --config=configs/t5_base.py [--rounds=5] [--steps=0] [--every=1000] [--directory=DIR]

The state of the config, with random values, is saved `--rounds` times into DIR (default: a temporary directory). Prints
JSON lines: the machine; the size of the state, and how long the loop waits for a save (`stall_s`, and in CPU time of
its thread `stall_cpu_s`), the save is in progress (`save_s`), what it costs all threads in CPU time (`cpu_s`), and the
part of it for the digests of all arrays (`digest_cpu_s`).
With --steps=N, N steps of `train_step.py` without and N steps with a save that starts before the first of them are run
in turns, and the CPU time that the save adds is printed (`added_cpu_s`), its share of `--every` steps, and the number
of steps between saves at which it is 5 %. Results are medians over the rounds.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import measurement
from train_step import Trainer

from t5like.cli.flags import Parser
from t5like.cli.main import start_devices
from t5like.config import loader
from t5like.config.schema import Config
from t5like.errors import UserError
from t5like.sharding import allocator

if TYPE_CHECKING:
    from t5like.checkpoint.checkpoints import Checkpoints
    from t5like.types import TrainState

LIMIT = 0.05  # of the step time


def parse(arguments: list[str]) -> tuple[argparse.Namespace, Config]:
    """The options and the config of a command line."""
    parser = Parser(prog="saving.py", description="Measure the cost of saving checkpoints.", allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="--config.SECTION.FIELD=VALUE changes a field")
    parser.add_argument("--fake_devices", type=int, default=None, metavar="N", help="N CPU devices in this process")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="saves of each kind")
    parser.add_argument("--steps", type=int, default=0, metavar="N", help="training steps of a round; 0: saves alone")
    parser.add_argument("--every", type=int, default=1000, metavar="N", help="as train.checkpoint_every")
    parser.add_argument(
        "--directory", type=Path, default=None, metavar="DIR", help="an empty one on the disk to measure"
    )
    rest, overrides = measurement.split(arguments)
    return parser.parse_args(rest), loader.load(parser.parse_args(rest).config, overrides)


def random_state(config: Config) -> "TrainState":
    """A state of random normal values: its digits are as hard to compress as those of a trained one."""
    import jax
    import numpy as np

    from t5like.data import pipeline
    from t5like.optim import train_state
    from t5like.sharding import auto
    from t5like.sharding import mesh as meshes

    mesh = meshes.make_mesh(config)
    config = auto.resolve_auto(config, mesh)
    rng = np.random.default_rng(0)

    def values(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        drawn = rng.standard_normal(leaf.shape, np.float32) if leaf.ndim else np.zeros(())
        return jax.device_put(drawn.astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(values, train_state.abstract_state(config, pipeline.spec(config), mesh))


def save(checkpoints: "Checkpoints", state: "TrainState", config: Config) -> None:
    """Start to save, as the training loop does."""
    checkpoints.save(state, config=config, tokenizer=b"", tokenizer_hash="")


def at_step(state: "TrainState", step: int) -> "TrainState":
    """The state under another step: a step that is complete is not saved again."""
    import jax
    import numpy as np

    return state._replace(step=jax.device_put(np.int32(step), state.step.sharding))


def save_alone(checkpoints: "Checkpoints", config: Config, rounds: int) -> None:
    """Measure saves while nothing else runs."""
    import jax

    from t5like.checkpoint import digests
    from t5like.checkpoint.checkpoints import leaves_of

    state, spent = random_state(config), []
    for index in range(rounds):
        begin, cpu = time.perf_counter(), time.process_time()
        own = time.thread_time()
        save(checkpoints, at_step(state, index + 1), config)
        stall, own = time.perf_counter() - begin, time.thread_time() - own
        checkpoints.wait()
        spent.append((stall, own, time.perf_counter() - begin, time.process_time() - cpu))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    stall, own, whole, cpu = (statistics.median(part) for part in zip(*spent, strict=True))
    stalls = [each[0] for each in spent]
    begin = time.process_time()
    digests.examine(leaves_of(state))
    digest = time.process_time() - begin
    measurement.emit(
        state_mb=size / 1e6,
        stall_s=stall,
        stall_cpu_s=own,
        save_s=whole,
        cpu_s=cpu,
        digest_cpu_s=digest,
        stalls_s=stalls,
    )


def save_during_steps(checkpoints: "Checkpoints", config: Config, options: argparse.Namespace) -> None:
    """Measure what saves add to training steps."""
    trainer = Trainer(config)
    trainer.run(1)
    spent = []
    for index in range(2 * options.rounds):
        begin, cpu = time.perf_counter(), time.process_time()
        if saving := index % 2:
            save(checkpoints, at_step(trainer.state, 10**6 + index), config)
        trainer.run(options.steps)
        if saving:
            checkpoints.wait()
        spent.append((time.perf_counter() - begin, time.process_time() - cpu))
    pairs = list(zip(spent[::2], spent[1::2], strict=True))
    step = statistics.median(plain[1] for plain, _ in pairs) / options.steps
    added = statistics.median(saved[1] - plain[1] for plain, saved in pairs)
    wall = statistics.median(saved[0] - plain[0] for plain, saved in pairs)
    measurement.emit(
        cpu_step_s=step,
        added_cpu_s=added,
        added_s=wall,
        cpu_share=added / (options.every * step),
        steps_at_5_percent=added / (LIMIT * step),
    )


def main(arguments: list[str]) -> None:
    """Run the benchmark of the command line."""
    options, config = parse(arguments)
    start_devices(options.fake_devices)
    allocator.keep_freed()
    import jax

    from t5like.checkpoint.checkpoints import Checkpoints

    measurement.emit(**measurement.machine("jax", "jaxlib", "orbax-checkpoint"), devices=len(jax.devices()))
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        checkpoints = Checkpoints(Path(directory) / "checkpoints", keep=1)
        save_alone(checkpoints, config, options.rounds)
        if options.steps:
            save_during_steps(checkpoints, config, options)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"saving.py: {error}")
