"""The results of `accelerator.py` as one object, with its goals, and as Markdown tables. Standard library only."""

import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import measurement
from accelerator_shapes import CUDNN_GOAL, MFU_GOALS, PEER_GOAL, SHAPES

Row = dict[str, Any]
NAMES = {"t5like": "t5like", "torch": "PyTorch, compiled"}


def make(rows: list[Row], machines: dict[str, Row], left: dict[str, str], command: str, *, toy: bool) -> Row:
    """All that a call has measured, or taken from earlier calls.

    Args:
        rows: of parts.
        machines: of the processes, by program.
        left: parts that were not measured, and why.
        command: that was run.
        toy: the sizes mean nothing, so goals are not judged.
    """
    results: dict[str, dict[str, Row]] = {program: {} for program in NAMES}
    for row in rows:
        machines = {row["program"]: row["machine"]} | machines
        if row["status"] == "done":
            results[row["program"]][row["part"]] = row["result"]
    report = {"command": command, "toy": toy, "driver": driver(), "machines": machines, "results": results}
    return report | {"not_measured": left, "goals": list(goals(results, judged=not toy))}


def driver() -> str | None:
    """Cards and version of NVIDIA's driver, as nvidia-smi prints them; None without it."""
    if not (program := shutil.which("nvidia-smi")):
        return None
    query = [program, "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, encoding="utf-8", timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


# ---- Goals ----


def goals(results: dict[str, dict[str, Row]], *, judged: bool) -> Iterator[Row]:
    """Each goal with what was measured, and whether it is met; None where it was not measured, or is not judged."""

    def goal(name: str, measured: float | None, needed: float) -> Row:
        met = None if measured is None or not judged else measured >= needed
        return {"goal": name, "measured": measured, "needed": needed, "met": met}

    ours, torch = results["t5like"], results["torch"]
    for name, needed in MFU_GOALS.items():
        yield goal(f"{name}: MFU of the bfloat16 peak", ours.get(name, {}).get("mfu"), needed)
    for name in SHAPES:
        yield goal(f"{name}: tokens/s over those of compiled PyTorch", over_torch(ours, torch, name), PEER_GOAL)
    for case in ours.get("attention_speed", {}).get("cases", ()):
        if case["biased"]:
            yield goal(f"attention, {case['case']}: rate over cuDNN's", over_cudnn(case), CUDNN_GOAL)


def over_torch(ours: dict[str, Row], torch: dict[str, Row], name: str) -> float | None:
    """Tokens per second of a model over those of PyTorch."""
    if name not in ours or name not in torch:
        return None
    return ours[name]["tokens_per_second"] / torch[name]["tokens_per_second"]


def over_cudnn(case: Row) -> float | None:
    """Rate of an attention over cuDNN's."""
    return case["cudnn_ms"] / case["ours_ms"] if case["cudnn_ms"] and case["ours_ms"] else None


# ---- Markdown ----


def markdown(report: Row) -> str:
    """The tables."""
    ours, torch = report["results"]["t5like"], report["results"]["torch"]
    sections = {
        "Machine": machine_table(report),
        "Goals": [dict(goal, met=answer(goal["met"])) for goal in report["goals"]],
        "Attention: values and gradients": value_table(ours),
        "Loss curve, 20 steps": curve_table(ours),
        "Matmuls": matmul_table(report["results"]),
        "Attention: forward and backward": speed_table(ours),
        "Training steps": step_table(ours, torch),
        "Decoding of T5 base, greedy": decoding_table(report["results"]),
        "Not measured": [{"part": part, "reason": reason} for part, reason in report["not_measured"].items()],
    }
    note = "Toy sizes: these numbers mean nothing.\n\n" if report["toy"] else ""
    text = "\n\n".join(f"### {title}\n\n{measurement.table(rows)}" for title, rows in sections.items() if rows)
    return f"`{report['command']}`\n\n{note}{text}\n"


def answer(met: bool | None) -> str:
    """Whether a goal is met, or a check passed."""
    return {None: "", True: "yes", False: "NO"}[met]


def machine_table(report: Row) -> list[Row]:
    """Card, driver, versions and precision of each process."""
    rows = [{"": "driver", "value": report["driver"]}] if report["driver"] else []
    for program, machine in report["machines"].items():
        rows += [{"": f"{NAMES[program]}: {name}", "value": str(value)} for name, value in machine.items() if value]
    return rows


def value_table(ours: dict[str, Row]) -> list[Row]:
    """Errors of the attention kernel."""
    rows = []
    for case in ours.get("attention_values", {}).get("cases", ()):
        errors, plain = case["errors"], case["plain"]  # by name of an array, or why it does not run
        rows.append(
            {
                "case": case["case"],
                "dtype": case["dtype"],
                "kernel": case["kernel"],
                "largest error": case["largest"] if isinstance(errors, dict) else errors,
                "plain's": max(plain.values()) if isinstance(plain, dict) else plain,
                "error of the bias's gradient": errors.get("bias") if isinstance(errors, dict) else None,
                "passed": answer(case["passed"]),
            }
        )
    return rows


def curve_table(ours: dict[str, Row]) -> list[Row]:
    """The distance of the losses on the device from those on the CPU."""
    if not (result := ours.get("loss_curve")):
        return []
    return [
        {
            "dtype": dtype,
            "first loss": result[dtype]["losses"][0],
            "last loss": result[dtype]["losses"][-1],
            "on the CPU in float32": result["cpu"][-1],
            "largest relative difference": result[dtype]["difference"],
            "passed": answer(result[dtype]["passed"]),
        }
        for dtype in ("float32", "bfloat16")
    ]


def matmul_table(results: dict[str, dict[str, Row]]) -> list[Row]:
    """Rates of large matmuls."""
    return [
        {"program": NAMES[program], "size": each["matmul"]["size"], "dtype": dtype, "TFLOP/s": rate}
        for program, each in results.items()
        if "matmul" in each
        for dtype, rate in each["matmul"]["tflops"].items()
    ]


def speed_table(ours: dict[str, Row]) -> list[Row]:
    """Times of attention; all pairs of tokens count as FLOPs."""
    return [
        {
            "case": case["case"],
            "kernel": case["kernel"],
            "ms": case["ours_ms"],
            "TFLOP/s": case["ours_ms"] and 1e3 * case["tflop"] / case["ours_ms"],
            "plain ms": case["plain_ms"],
            "cuDNN ms": case["cudnn_ms"],
            "rate / cuDNN's": over_cudnn(case),
            "cuDNN ms without bias": case["cudnn_unbiased_ms"],
            "does not run": "; ".join(
                f"{way}: {error}" for way in ("ours", "plain", "cudnn") if (error := case[f"{way}_error"])
            ),
        }
        for case in ours.get("attention_speed", {}).get("cases", ())
    ]


def step_table(ours: dict[str, Row], torch: dict[str, Row]) -> list[Row]:
    """Training steps of both libraries; FLOPs are `model_flops` for both."""
    rows = []
    rate = ours.get("matmul", {}).get("tflops", {}).get("bfloat16")
    for name in SHAPES:
        flops = name in ours and ours[name]["flops_per_step"] / ours[name]["rows"]
        for program, results in (("t5like", ours), ("torch", torch)):
            if not (result := results.get(name)):
                continue
            tflops = flops and flops * result["rows"] / result["step_ms"] / 1e9
            peak = ours[name]["mfu"] and ours[name]["tflops"] / ours[name]["mfu"] if flops else None
            rows.append(
                {
                    "model": name,
                    "program": NAMES[program],
                    "parameters": result["params"],
                    "rows": result["rows"],
                    "remat": result["remat"],
                    "tokens/s": result["tokens_per_second"],
                    "step ms": result["step_ms"],
                    "TFLOP/s": tflops or None,
                    "MFU": peak and tflops / peak,
                    "of matmul rate": rate and tflops and tflops / rate,
                    "memory GiB": result["memory_gib"],
                    "compile s": result.get("compile_s"),
                    "start to first step s": result["ready_s"],
                    "plan ms": result.get("plan_ms"),
                    "plan --quick ms": result.get("quick_ms"),
                    "tokens/s / PyTorch's": over_torch(ours, torch, name) if program == "t5like" else None,
                }
            )
    return rows


def decoding_table(results: dict[str, dict[str, Row]]) -> list[Row]:
    """Decoding of both libraries; `generate` of transformers is not compiled."""
    return [
        {
            "rows": case["rows"],
            "program": {"t5like": "t5like", "torch": "transformers.generate"}[program],
            "prompt": case["prompt"],
            "new tokens": case["new"],
            "tokens/s": case["tokens_per_second"],
            "ms a token": case["token_ms"],
            "first call s": case["first_s"],
        }
        for program, each in results.items()
        for case in each.get("decoding", {}).get("cases", ())
    ]
