"""Plans of big models, and small probes, for TPUs that are not here, next to what they were: `make golden`.

    make golden                                 all of them, minutes each on one core; exit code 1 if one differs
    make golden ARGS=--probes                   the small ones; CI compiles the one of T5
    make golden ARGS="--write llama_7b_v5e"     renew those whose names begin so
    make golden ARGS=--keep=DIR                 leave the programs in DIR/NAME, or read what an earlier run left there

A golden holds what a change of model, mesh, step, reader or compiler moves: bytes, collectives, cycles, predicted time.
It is all the compiler's arithmetic, equal on every machine. What compiling cost is in the printed table only.
"""

import argparse
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"  # an accelerator that is here stays free
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}  # silence their absence

from t5like.config import loader
from t5like.config.schema import Config
from t5like.errors import UserError
from t5like.io.atomic import atomic_write
from t5like.metrics import flops
from t5like.plan import compile as compiler
from t5like.plan import estimate, planner, topology
from t5like.plan.topology import Topology
from t5like.sharding import auto
from t5like.sharding import mesh as meshes

ROOT = Path(__file__).parent.parent.parent
PLANS = Path(__file__).parent / "plans"
SHOWN = 10  # differences of a case

LLAMA = {"data.targets_length": "2048"}
LONG = {
    "tokenizer.num_sentinels": "114",
    "data.inputs_length": "2048",
    "data.targets_length": "512",
    "data.batch_size": "512",
}
# Three axes of a torus are one too many for fsdp: libtpu gathers over them by all-reduces of zeros. And a v5p has
# memory for the products of all layers.
V5P = {"model.remat": "dots", "mesh.fsdp": "64", "mesh.data": "8"}
V5P_2048 = {"model.remat": "dots", "mesh.fsdp": "128", "mesh.data": "16"}
TINY = {
    "data.batch_size": "16",
    "model.num_layers": "3",
    "model.layers": "scan",
    "model.model_dim": "256",
    "model.mlp_dim": "512",
    "model.remat": "full",
    "mesh.data": "1",
    "mesh.fsdp": "-1",
    "optimizer.name": "adamw_rms",
    "optimizer.learning_rate": "0.1",
    "optimizer.schedule": "cosine",
}


class Case(NamedTuple):
    """One train step on one machine."""

    name: str
    config: str
    topology: str
    settings: dict[str, str]
    num_slices: int = 1
    probe: bool = False


CASES = (
    Case("probe_decoder_v5e_2x4", "tiny", "v5e:2x4", TINY | {"model.architecture": "decoder"}, probe=True),
    Case("probe_t5_v5p_2x2x1", "tiny", "v5p:2x2x1", TINY, probe=True),
    Case("probe_decoder_v6e_2x2", "tiny", "v6e:2x2", TINY | {"model.architecture": "decoder"}, probe=True),
    Case("llama_7b_v5e_16x16_1_row", "llama_7b", "v5e:16x16", LLAMA | {"data.batch_size": "256"}),
    Case("t5_xxl_v5e_16x16_8_rows", "t5_xxl", "v5e:16x16", {}),
    Case("llama_7b_v5e_16x16_4_rows", "llama_7b", "v5e:16x16", LLAMA | {"model.remat": "qk"}),
    Case("llama_7b_v5p_8x8x8_2_rows", "llama_7b", "v5p:8x8x8", LLAMA | V5P),
    Case("llama_7b_2_v5e_16x16_1_row", "llama_7b", "v5e:16x16", LLAMA | {"data.batch_size": "512"}, num_slices=2),
    Case("llama_7b_v5p_8x16x16_1_row", "llama_7b", "v5p:8x16x16", LLAMA | V5P_2048 | {"data.batch_size": "2048"}),
    Case("t5_xxl_v5p_8x8x8_4_rows", "t5_xxl", "v5p:8x8x8", V5P),
    Case("t5_xxl_2_v5e_16x16_8_rows", "t5_xxl", "v5e:16x16", {"data.batch_size": "4096"}, num_slices=2),
    Case("t5_xxl_v5p_8x16x16_4_rows", "t5_xxl", "v5p:8x16x16", V5P_2048 | {"data.batch_size": "8192"}),
    Case("t5_xxl_v5e_16x16_2_long_rows", "t5_xxl", "v5e:16x16", LONG),
    Case("t5_xxl_2_v5e_16x16_2_long_rows", "t5_xxl", "v5e:16x16", LONG | {"data.batch_size": "1024"}, num_slices=2),
    Case("t5_xxl_v5p_8x8x8_1_long_row", "t5_xxl", "v5p:8x8x8", LONG | V5P),
    Case("t5gemma_2b_v5e_8x8_1_row", "t5gemma_2b", "v5e:8x8", {"data.batch_size": "64"}),
    Case("t5_xxl_v5p_8x16x16_1_long_row", "t5_xxl", "v5p:8x16x16", LONG | V5P_2048 | {"data.batch_size": "2048"}),
)
HEADER = (
    "| case | arguments GiB | temporary GiB | peak GiB | cycles s | exposed s | step s | MFU | exposed in loops GB "
    "| compile CPU s | compile RSS GiB |\n" + "|---" * 11 + "|"
)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line, and in `chosen` the cases that it names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--probes", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args(arguments)
    options.chosen = [
        case
        for case in CASES
        if case.probe >= options.probes and (not options.names or case.name.startswith(tuple(options.names)))
    ]
    if not options.chosen:
        parser.error(f"no case has such a name; they are {', '.join(case.name for case in CASES)}")
    return options


def main(arguments: list[str]) -> int:
    """Compile and compare; the exit code."""
    options, failed = parse(arguments), []
    print(HEADER, flush=True)
    for case in options.chosen:
        try:
            plan, model_flops = planned(case, options.keep)
        except UserError as error:
            print(f"{case.name}: {error}", flush=True)
            failed.append(case.name)
            continue
        print(row(case, plan), flush=True)
        golden = {"compiler": compilers(), "case": case._asdict(), "plan": facts(plan, model_flops)}
        path = PLANS / f"{case.name}.json"
        if options.write:
            PLANS.mkdir(exist_ok=True)
            with atomic_write(path) as file:
                file.write((json.dumps(golden, indent=1) + "\n").encode())
        elif lines := differences(json.loads(path.read_text()) if path.exists() else {}, golden):
            failed.append(case.name)
            print("\n".join(lines[:SHOWN] + [f"  and {len(lines) - SHOWN} more"] * (len(lines) > SHOWN)), flush=True)
    if failed:
        print(f"differ: {', '.join(failed)}; if they should, renew them: make golden ARGS='--write {' '.join(failed)}'")
    return bool(failed)


def resolved(case: Case) -> tuple[Config, Topology]:
    """The resolved config that is compiled, and the machine."""
    machine = topology.parse(case.topology, case.num_slices)
    config = loader.load(ROOT / "configs" / f"{case.config}.py", list(case.settings.items()))
    return auto.resolve_auto_for(planner.for_slices(config, machine), machine.chip.platform), machine


def planned(case: Case, keep: Path | None) -> tuple[planner.Plan, float]:
    """The plan of a case's train step, and the model's FLOPs of a device and step."""
    config, machine = resolved(case)
    compiler.check_installed(machine)
    persistent = estimate.persistent_memory(
        estimate.abstract_inputs(config), meshes.axis_sizes(config, machine.num_devices)
    )
    directory = keep and keep.absolute() / case.name
    if directory and (directory / "train.json").exists():
        program = compiler.read(directory, "train")
    else:
        [program] = compiler.compile_steps(config, machine, ("train",), directory).values()
    plan = planner.describe_program(config, machine, program, persistent.total, is_train=True)
    return plan, flops.model_flops(config) / machine.num_devices


def compilers() -> dict[str, str]:
    """The versions that a golden is of."""
    return {name: version(name) for name in ("jax", "jaxlib", "libtpu")}


def facts(plan: planner.Plan, model_flops: float) -> dict[str, Any]:
    """What a golden holds of a plan; bytes, cycles and runs of a device and step."""
    if "flops" not in plan:
        return {"fits": plan["fits"], "memory": plan["memory"]}
    short = lambda value: float(f"{value:.6g}")
    return {
        "fits": plan["fits"],
        "memory": plan["memory"],
        "flops_over_model": short(plan["flops"] / model_flops),
        "cycles": {name: int(cycles) for name, cycles in sorted(plan["cycles"].items())},
        "collectives": {
            f"{each['kind']}, {'in loops' if each['in_loop'] else 'once'}, "
            f"{'overlapped' if each['asynchronous'] else 'exposed'}, {each['group']} devices": {
                "runs": each["runs"],
                "bytes": each["bytes"],
            }
            for each in plan["collectives"]
        },
        "slices_bytes": int(plan["slices_bytes"]),
        "custom_calls": dict(sorted(plan["custom_calls"].items())),
        "seconds": {name: short(plan["time"][name]) for name in ("compute", "exposed", "custom", "seconds")},
        "mfu": short(plan["time"]["mfu"]),
    }


def row(case: Case, plan: planner.Plan) -> str:
    """A line of the table, as benchmarks/RESULTS.md has it."""
    cost = f"{plan['compile_cpu_seconds']:.0f} | {plan['compile_resident'] / 2**30:.1f}"
    memory = plan["memory"]
    if "needed" in memory:
        return f"| {case.name} | out of memory: {memory['needed'] / 2**30:.1f} |" + " |" * 7 + f" {cost} |"
    gib = " | ".join(f"{memory[name] / 2**30:.2f}" for name in ("arguments", "temporary", "peak_alive"))
    if "flops" not in plan:
        return f"| {case.name} | {gib} | can't be read |" + " |" * 4 + f" {cost} |"
    time = plan["time"]
    seconds = " | ".join(f"{time[name]:.3f}" for name in ("compute", "exposed", "seconds"))
    waited = sum(each["bytes"] for each in plan["collectives"] if each["in_loop"] and not each["asynchronous"])
    return f"| {case.name} | {gib} | {seconds} | {100 * time['mfu']:.1f} % | {waited / 1e9:.1f} | {cost} |"


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """A line for each number or word that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(each for each in new if each not in old)]
        return [line for each in names for line in differences(old.get(each), new.get(each), f"{name}/{each}")]
    if old == new:
        return []
    if isinstance(old, dict) or isinstance(new, dict):
        return [f"  {name.lstrip('/')}: {'not there' if old is None else 'there'} before"]
    change = ""
    if isinstance(old, int | float) and isinstance(new, int | float) and old:
        change = f" ({100 * (new / old - 1):+.2f} %)"
    shown = lambda value: f"{value:,}" if isinstance(value, int | float) else str(value)
    return [f"  {name.lstrip('/')}: {shown(old)} -> {shown(new)}{change}"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
