"""Cost of the checks of a training step: spikes, the comparison of replicas, and statistics of layers.

    python benchmarks/checks.py --config=configs/tiny.py [--fake_devices=2] [--rounds=10] [--steps=4] [--every=100]

Two trainers of `train_step.py` run alternately, `--steps` steps at a time: without and with `train.spike_factor`.
Between them the replicas of the state are compared; with N fake devices there are N of them. Then the statistics of
layers are computed and written as `train.stats_every` does. Prints JSON lines: the machine; for the spike check the
time of a step without it and what it adds, as a share of the step; for the comparison and the statistics their time,
and its share of `--every` steps. Results are medians over the rounds, in wall time, and in CPU time, which
depends less on what else the machine does (`cpu_`; without meaning on an accelerator).
"""

import argparse
import atexit
import dataclasses
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import measurement
from train_step import Trainer

from t5like.cli.flags import Parser
from t5like.cli.main import start_devices
from t5like.config import loader
from t5like.config.schema import Config
from t5like.errors import UserError
from t5like.sharding import allocator


def parse(arguments: list[str]) -> tuple[argparse.Namespace, Config]:
    """The options and the config of a command line."""
    parser = Parser(prog="checks.py", description="Measure the cost of the checks of a step.", allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="--config.SECTION.FIELD=VALUE changes a field")
    parser.add_argument("--fake_devices", type=int, default=None, metavar="N", help="N CPU devices in this process")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="alternations")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="steps of a trainer in a round")
    parser.add_argument("--every", type=int, default=100, metavar="N", help="steps between comparisons, statistics")
    rest, overrides = measurement.split(arguments)
    return parser.parse_args(rest), loader.load(parser.parse_args(rest).config, overrides)


def main(arguments: list[str]) -> None:
    """Run the benchmark of the command line."""
    options, config = parse(arguments)
    start_devices(options.fake_devices)
    allocator.keep_freed()
    from t5like.train.replicas import differing_devices

    spikes = dataclasses.replace(config, train=dataclasses.replace(config.train, spike_factor=10.0))
    plain, checked = (Trainer(each) for each in (config, spikes))
    for trainer in (plain, checked):
        trainer.run(2)
    assert differing_devices(checked.state) == {}  # compiles
    statistics_of = statistics_program(plain)
    rounds = []
    for index in range(options.rounds):
        runs = [partial(trainer.run, options.steps) for trainer in (plain, checked)]
        spent = [measure(run) for run in (runs if index % 2 else runs[::-1])]
        spent = spent if index % 2 else spent[::-1]
        rounds.append([*spent, measure(partial(differing_devices, checked.state)), measure(statistics_of)])
    import jax

    measurement.emit(**measurement.machine("jax", "jaxlib"), devices=len(jax.devices()))
    for prefix, clock in (("", 0), ("cpu_", 1)):
        before, after, compare, layers = ([each[part][clock] for each in rounds] for part in range(4))
        step = statistics.median(before) / options.steps
        shares = [checked / plain - 1 for plain, checked in zip(before, after, strict=True)]
        measurement.emit(
            check="spikes",
            **{f"{prefix}step_ms": 1e3 * step, f"{prefix}share": statistics.median(shares)},
            shares=shares,
        )
        for name, verb, values in (("replicas", "compare", compare), ("statistics", "compute", layers)):
            spent = statistics.median(values)
            shown = {f"{prefix}{verb}_ms": 1e3 * spent, f"{prefix}share": spent / (options.every * step)}
            measurement.emit(check=name, **shown)


def statistics_program(trainer: Trainer) -> Callable[[], object]:
    """The function that computes and writes the statistics of a trainer's layers; it has been called once."""
    import jax

    from t5like.data import pipeline
    from t5like.metrics.writers import Writer
    from t5like.optim import layer_statistics, train_state
    from t5like.sharding import placement

    config, shape = trainer.config, pipeline.spec(trainer.config)
    abstract = train_state.abstract_state(config, shape, trainer.mesh)
    program = layer_statistics.compile_statistics(config, shape, abstract)
    rows = placement.to_global(trainer.batch, trainer.mesh, config.data.batch_size)
    directory = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, directory)
    writer = Writer(Path(directory))

    def run() -> None:
        writer.write(1, layer_statistics.by_name(jax.device_get(program(trainer.state, rows))))

    run()
    return run


def measure(function: Callable[[], object]) -> tuple[float, float]:
    """Wall seconds and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"checks.py: {error}")
