"""Held-out loss of a config under several settings, beside the processor time of each run.

    python benchmarks/sweep.py SETTINGS [--config=configs/tiny.py] [--workdir=runs/sweep] [--config.SECTION.FIELD=VALUE]

SETTINGS is a text file. Each line is a name and what `t5like train` gets for it, such as

    rows8  --config.data.batch_size=8 --config.train.num_steps=3600

The runs are made one after the other, each in a directory of `--workdir`. A run that is complete is not made again.
`--config...` on the command line holds for all of them. Each run is evaluated once, on the whole held-out text, so that
its loss does not depend on its batch size. Processor time is that of the whole process, with its start and compilation:
other programs on the machine change it little. Losses of different tokenizers can't be compared; bits per byte can.

Prints a JSON line per run, and a table in Markdown on standard error.
"""

import argparse
import json
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import measurement

ONE_EVALUATION = (  # at the end, of all held-out rows
    "--config.train.eval_every=1000000000",
    "--config.train.early_evals=0",
    "--config.train.eval_batches=1000000",
    "--config.train.checkpoint_every=1000000000",
)


def read_settings(path: Path) -> dict[str, list[str]]:
    """The flags of each run by its name."""
    lines = (shlex.split(line, comments=True) for line in path.read_text(encoding="utf-8").splitlines())
    return {line[0]: line[1:] for line in lines if line}


def processor_seconds() -> float:
    """Processor time of all processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run(name: str, flags: list[str], options: argparse.Namespace) -> dict[str, object]:
    """Train one run, unless its result is there already."""
    workdir = options.workdir / name
    stored = workdir / "sweep.json"
    if stored.exists():
        return json.loads(stored.read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "t5like", "train", f"--config={options.config}", f"--workdir={workdir}"]
    begin = processor_seconds()
    subprocess.run([*command, *ONE_EVALUATION, *options.flags, *flags], check=True, stdout=sys.stderr)
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = next(record for record in reversed(records) if "eval/loss" in record)
    result = {
        "name": name,
        "flags": " ".join(flag.removeprefix("--config.") for flag in flags),
        "steps": last["step"],
        "held-out loss": last["eval/loss"],
        "accuracy": last["eval/accuracy"],
        "bits per byte": last["eval/bits_per_byte"],
        "CPU s": processor_seconds() - begin,
    }
    stored.write_text(json.dumps(result), encoding="utf-8")
    return result


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line; `flags` are those of all runs."""
    parser = argparse.ArgumentParser(description="Compare settings of a config at about the same processor time.")
    parser.add_argument("settings", type=Path, help="a file; each line is a name and flags of t5like train")
    parser.add_argument("--config", default="configs/tiny.py")
    parser.add_argument("--workdir", type=Path, default=Path("runs/sweep"))
    options, options.flags = parser.parse_known_args(arguments)
    return options


def main(arguments: list[str]) -> None:
    """Make the runs of a file of settings."""
    options = parse(arguments)
    results = []
    for name, flags in read_settings(options.settings).items():
        results.append(run(name, flags, options))
        measurement.emit(**results[-1])
    print(measurement.table(sorted(results, key=lambda result: result["held-out loss"])), file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
