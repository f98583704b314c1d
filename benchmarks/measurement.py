"""Measurements of a process and its machine, and the protocol by which `peers` requests steps from other processes.

Standard library only, Linux: the PyTorch process imports nothing else of t5like. A serving process prints JSON lines:
first the cost of its start; for each line "N" on its input the times of N steps; at the end of the input its memory.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

UPDATE: dict[str, object] = {  # fields of a config whose update PyTorch's optimizers do as well
    "optimizer.learning_rate": 1e-4,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "optimizer.weight_decay": 0.01,
    "optimizer.clip_norm": 0,
    "train.z_loss": 0,
}
WIDEST = ("amx_tile", "avx512f", "avx2", "sve", "asimd")  # instruction sets, the fastest first


def split(arguments: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Take the pairs of ``--config.section.field=value`` out of a command line."""
    rest, pairs = [], []
    for argument in arguments:
        if argument.startswith("--config.") and "=" in argument:
            pairs.append(argument.removeprefix("--config.").partition("=")[::2])
        else:
            rest.append(argument)
    return rest, pairs


def emit(**values: object) -> None:
    """Print one JSON line at once; floats get four significant digits."""
    print(json.dumps({name: short(value) for name, value in values.items()}), flush=True)


def short(value: object) -> object:
    """Round floats, also in lists, to four significant digits, from 1000 on to integers; keep other values."""
    match value:
        case list():
            return [short(item) for item in value]
        case float():
            return round(value) if abs(value) >= 1000 else float(f"{value:.4g}")
    return value


def since_start() -> float:
    """Seconds since this process was started, in hundredths; an exec does not reset it."""
    ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    return float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


def peak_memory_mb() -> int:
    """Peak resident memory of this process (VmHWM, in MB of 2**20 bytes), without child processes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024


def machine(*packages: str) -> dict[str, object]:
    """CPU model and its widest instruction set, cores that this process may use, load of the last minute, date, and
    versions of Python and packages.
    """
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    versions = {"python": sys.version.split()[0], **{package: metadata.version(package) for package in packages}}
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "cpu": cpu,
        "instructions": next((name for name in WIDEST if name in flags), "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        **versions,
    }


def time_steps(run: Callable[[int], list[float]], count: int) -> dict[str, list[float] | float]:
    """Run `count` steps with a function that returns their seconds: milliseconds of each, CPU milliseconds of one."""
    begin = time.process_time()
    seconds = run(count)
    return {"step_ms": [1e3 * s for s in seconds], "cpu_ms": 1e3 * (time.process_time() - begin) / count}


def serve(run: Callable[[int], list[float]]) -> None:
    """For each line "N" on standard input print the times of N steps, until the input ends."""
    for line in sys.stdin:
        emit(**time_steps(run, int(line)))


def table(rows: list[dict[str, object]]) -> str:
    """A Markdown table whose columns are the keys of the first row; numbers to the right, None as nothing."""
    columns = list(rows[0])
    cells = [["" if row[column] is None else _cell(row[column]) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    right = [all(isinstance(row[column], int | float | None) for row in rows) for column in columns]

    def line(values: list[str]) -> str:
        padded = (v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 1) + (":" if r else "-") for width, r in zip(widths, right, strict=True)) + "|"
    return "\n".join([line(columns), rule, *(line(values) for values in cells)])


def _cell(value: object) -> str:
    value = short(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def summary(step_ms: list[float], tokens: float) -> dict[str, float]:
    """Median and least step, and tokens per second at the median."""
    median = statistics.median(step_ms)
    return {"tokens_per_second": 1e3 * tokens / median, "step_ms": median, "step_ms_min": min(step_ms)}
