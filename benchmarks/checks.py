"""Cost of the checks of a training step: spikes, and the comparison of replicas.

    python benchmarks/checks.py --config=configs/tiny.py [--fake_devices=2] [--rounds=10] [--steps=4] [--every=100]

Two trainers of `train_step.py` run alternately, `--steps` steps at a time: without and with `train.spike_factor`.
Between them the replicas of the state are compared; with N fake devices there are N of them. Prints JSON lines: the
machine; medians of both step times, and the cost of the spike check as a share of the step, the median over the rounds;
the time of one comparison, and its share of `--every` steps.
"""

import argparse
import dataclasses
import statistics
import sys
import time

import measurement
from train_step import Trainer

from t5like.cli.flags import Parser
from t5like.cli.main import keep_freed_memory, start_devices
from t5like.config import loader
from t5like.config.schema import Config
from t5like.errors import UserError


def parse(arguments: list[str]) -> tuple[argparse.Namespace, Config]:
    """The options and the config of a command line."""
    parser = Parser(prog="checks.py", description="Measure the cost of the checks of a step.", allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="--config.SECTION.FIELD=VALUE changes a field")
    parser.add_argument("--fake_devices", type=int, default=None, metavar="N", help="N CPU devices in this process")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="alternations")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="steps of a trainer in a round")
    parser.add_argument("--every", type=int, default=100, metavar="N", help="as train.compare_replicas_every")
    rest, overrides = measurement.split(arguments)
    return parser.parse_args(rest), loader.load(parser.parse_args(rest).config, overrides)


def main(arguments: list[str]) -> None:
    """Run the benchmark of the command line."""
    options, config = parse(arguments)
    start_devices(options.fake_devices)
    keep_freed_memory()
    from t5like.train.replicas import differing_devices

    spikes = dataclasses.replace(config, train=dataclasses.replace(config.train, spike_factor=10.0))
    plain, checked = (Trainer(each) for each in (config, spikes))
    for trainer in (plain, checked):
        trainer.run(2)
    assert differing_devices(checked.state) == {}  # compiles
    times: dict[str, list[float]] = {"plain": [], "checked": [], "compare": []}
    for index in range(options.rounds):
        order = [("plain", plain), ("checked", checked)]
        for name, trainer in order if index % 2 else order[::-1]:
            times[name].append(statistics.median(trainer.run(options.steps)))
        begin = time.perf_counter()
        differing_devices(checked.state)
        times["compare"].append(time.perf_counter() - begin)
    shares = [after / before - 1 for before, after in zip(times["plain"], times["checked"], strict=True)]
    step, compare = (statistics.median(times[name]) for name in ("plain", "compare"))
    import jax

    measurement.emit(**measurement.machine("jax", "jaxlib"), devices=len(jax.devices()))
    measurement.emit(
        check="spikes", step_ms=1e3 * step, checked_ms=1e3 * statistics.median(times["checked"]),
        share=statistics.median(shares), shares=shares,
    )  # fmt: skip
    measurement.emit(check="replicas", compare_ms=1e3 * compare, share=compare / (options.every * step))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"checks.py: {error}")
