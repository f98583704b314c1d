"""The report of `t5like inspect model` as text and as a page of HTML."""

from collections.abc import Sequence
from typing import Any

from t5like.errors import printable
from t5like.inspect.html import facts, notice, page, table
from t5like.io.storage import format_bytes

COLUMNS = ("parameter", "shape", "logical axes", "split", "bytes", "per device", "initial", "update", "rate", "decay")
PART_COLUMNS = ("part", "parameters", "bytes", "per device", "optimizer, per device", "FLOPs per token", "share")
LEFT = ("parameter", "part", "shape", "logical axes", "split", "initial", "update", "rate")


def text(report: dict[str, Any]) -> str:
    """The report as plain text."""
    lines = [f"{name:10} {value}" for name, value in _facts(report)]
    tables = [_aligned(COLUMNS, _rows(report)), _aligned(PART_COLUMNS, _parts(report))]
    warnings = [f"warning    {each['text']}" for each in report["warnings"]] or ["warnings   none"]
    return "\n".join([*lines, "", *tables[0], "", *tables[1], "", *map(printable, warnings)])


def render(report: dict[str, Any]) -> str:
    """The report as a page."""
    warnings = [notice("warning", each["text"]) for each in report["warnings"]] or notice("good", "No warning.")
    sections = [
        ("", facts(_facts(report))),
        ("Warnings", warnings),
        ("Parts", table(PART_COLUMNS, _parts(report))),
        ("Parameters", table(COLUMNS, _rows(report))),
    ]
    return page("Model", sections, style="th, td { white-space: nowrap; }")


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    total, memory, work, optimizer = (report[name] for name in ("total", "memory_per_device", "flops", "optimizer"))
    axes = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    frozen = total["parameters"] - total["trained"]
    counts = f"{total['parameters']:,} parameters"
    counts += f", {frozen:,} of them frozen" if frozen else ""
    available = f" of {format_bytes(memory['available'])}" if memory["available"] else ""
    kinds = [name for name in ("parameters", "optimizer", "average", "batch") if memory[name]]
    parts = ", ".join(f"{name} {format_bytes(memory[name])}" for name in kinds)
    machine = f" of {report['topology']}" if report["topology"] else ""
    devices = f"{report['devices']:,} devices" if report["devices"] > 1 else "one device"
    rate = f"{optimizer['name']}, learning rate {optimizer['learning_rate']:g} ({optimizer['schedule']})"
    return [
        ("model", f"{report['architecture']}, {counts}, computed in {report['dtype']}"),
        ("mesh", f"{axes}: {devices}{machine}"),
        ("memory", f"{format_bytes(memory['total'])}{available} on each device without activations: {parts}"),
        ("optimizer", f"{rate}, weight decay {optimizer['weight_decay']:g}, clip {optimizer['clip_norm']:g}"),
        (
            "FLOPs",
            f"{_short(work['per_token'])} per token and {_short(work['per_step'])} per step of "
            f"{work['tokens_per_step']:,} tokens: matmuls of three forward passes",
        ),
        ("initial", "mean and standard deviation of the initializers"),
    ]


def _rows(report: dict[str, Any]) -> list[list[str]]:
    return [
        [
            row["name"],
            " x ".join(map(str, row["shape"])) or "1",
            ", ".join(str(axis) for axis in row["axes"]),
            row["split"] if report["devices"] > 1 else "-",
            format_bytes(row["bytes"]),
            format_bytes(row["bytes_per_device"]),
            f"N({row['mean']:g}, {row['std']:.4g})" if row["std"] else f"{row['mean']:g}",
            row["update"],
            row["rate"] if row["rate_factor"] in (0, 1) else f"{row['rate']}, x {row['rate_factor']:g}",
            f"{row['weight_decay']:g}",
        ]
        for row in report["parameters"]
    ]


def _parts(report: dict[str, Any]) -> list[list[str]]:
    total = {"part": "total", **report["total"], "flops_per_token": report["flops"]["per_token"]}
    return [
        [
            part["part"],
            f"{part['parameters']:,}",
            format_bytes(part["bytes"]),
            format_bytes(part["bytes_per_device"]),
            format_bytes(part["state_bytes_per_device"]),
            _short(part["flops_per_token"]),
            f"{part['flops_per_token'] / max(report['flops']['per_token'], 1):.1%}",
        ]
        for part in [*report["parts"], total]
    ]


def _short(number: float) -> str:
    """A number with a unit, such as 1.53 G."""
    for limit, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:.3g}"


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in [header, *rows]:
        cells = [
            cell.ljust(width) if name in LEFT else cell.rjust(width)
            for name, cell, width in zip(header, row, widths, strict=True)
        ]
        lines.append(printable("  ".join(cells).rstrip()))
    return lines
