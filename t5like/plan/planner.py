"""Makes the plan of a run as one JSON object, which `report` formats. Bytes and FLOPs are per device, times in seconds.

Called by `t5like plan`.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from t5like.config.schema import Config
from t5like.errors import UserError
from t5like.metrics import flops
from t5like.plan import compile as compiler
from t5like.plan import estimate, gpu_time, hlo_cost, preflight, search
from t5like.plan.topology import Topology
from t5like.sharding import auto
from t5like.sharding import mesh as meshes

Plan = dict[str, Any]
MAX_COMPILED = 2  # alternative settings that are compiled if the config does not fit: minutes each for a large model


class PlanOptions(NamedTuple):
    """Options of the command line."""

    quick: bool = False
    search: int | None = None  # how many of the best candidates are compiled; None: no search
    tokens: float | None = None  # of the whole run
    price: float | None = None  # of a chip for an hour
    workdir: Path | None = None
    keep: Path | None = None  # folder for the compiled programs


def for_slices(config: Config, topology: Topology) -> Config:
    """The config with `mesh.slices` of the topology; `mesh.data` becomes the number of slices if it was 1."""
    slices, data = topology.num_slices, config.mesh.data
    mesh = dataclasses.replace(config.mesh, slices=slices, data=slices if data == 1 else data)
    return dataclasses.replace(config, mesh=mesh)


def make_plan(
    config: Config, topology: Topology, options: PlanOptions, log: Callable[[str], None]
) -> tuple[Plan, list[UserError]]:
    """Plan a run; also return the errors that `train` would raise.

    Raises:
        UserError: the config does not fit the topology, or the step can't be compiled.
    """
    if not options.quick:
        compiler.check_installed(topology)
    unresolved = config
    config = auto.resolve_auto_for(for_slices(config, topology), topology.chip.platform)
    sizes = meshes.axis_sizes(config, topology.num_devices)
    persistent = estimate.persistent_memory(estimate.abstract_inputs(config), sizes)
    quick = estimate.quick_estimate(config, topology, persistent)
    checks = [*preflight.run_checks(unresolved, options.workdir), *_slow_mesh_checks(topology, sizes)]
    plan: Plan = {
        "topology": _topology(topology),
        "mesh": sizes,
        "settings": list(search.settings(unresolved, config))
        + ([f"mesh.slices={config.mesh.slices}"] if unresolved.mesh.slices != config.mesh.slices else []),
        "model": {"parameters": _num_parameters(persistent), "dtype": config.model.dtype, "remat": config.model.remat},
        "model_flops": flops.model_flops(config) / topology.num_devices,
        "held": persistent._replace(leaves=())._asdict() | {"total": persistent.total},
        "quick": _quick(config, topology, quick),
        "arrays": [leaf._asdict() for leaf in persistent.leaves],
        "checks": [{"name": check.name, "state": check.state, "text": check.text} for check in checks],
    }
    del plan["held"]["leaves"]
    if options.quick and not plan["quick"]["fits"]:
        plan["nearest"] = _nearest(config, topology, 1.0, 0, (), log)
    if not options.quick:
        log(f"compiling the train and eval steps for {topology.name}; a large model takes minutes on any machine")
        programs = compiler.compile_steps(config, topology, ("train", "eval"), options.keep)
        for name, program in programs.items():
            plan[name] = describe_program(config, topology, program, persistent.total, is_train=name == "train")
        if short := [plan[name]["memory"] for name in programs if not plan[name]["fits"]]:
            needed = max(memory.get("total") or memory["needed"] for memory in short)
            steps = ("train",) if plan["eval"]["fits"] else ("train", "eval")
            plan["nearest"] = _nearest(config, topology, max(1.0, needed / quick.total), MAX_COMPILED, steps, log)
    if options.search is not None:
        plan["search"] = _search(config, topology, 0 if options.quick else options.search, log)
    plan["run"] = _run(config, topology, plan, options)
    return plan, [check.error for check in checks if check.error]


def _slow_mesh_checks(topology: Topology, sizes: dict[str, int]) -> list[preflight.Check]:
    if not (flat := estimate.two_axis_fsdp(topology, sizes["fsdp"])):
        return []
    use = f"--config.mesh.fsdp={flat} --config.mesh.data=-1"
    text = f"fsdp={sizes['fsdp']} needs three axes of the torus, where libtpu's all-gathers are slow; use {use}"
    return [preflight.Check("mesh", "slow", text)]


def _topology(topology: Topology) -> Plan:
    chip = topology.chip
    return {
        "name": topology.name,
        "devices": topology.num_devices,
        "memory": chip.memory,
        "peak_flops": chip.peak or None,
        "platform": chip.platform,
    }


def _num_parameters(persistent: estimate.PersistentMemory) -> int:
    return sum(math.prod(leaf.shape) for leaf in persistent.params.values())


def _quick(config: Config, topology: Topology, quick: estimate.QuickEstimate) -> Plan:
    plan = quick._asdict() | {"fits": search.fits(quick.total, topology.chip.memory)}
    return plan | ({"mfu": estimate.mfu(config, topology, quick.seconds)} if quick.seconds else {})


def describe_program(
    config: Config, topology: Topology, program: compiler.Program, persistent: int, *, is_train: bool
) -> Plan:
    """Memory, work and predicted time of a compiled step; persistent: bytes of state and batch."""
    if program.out_of_memory:
        needed = program.needed + (persistent if "temporaries" in program.out_of_memory else 0)
        return {
            "fits": False,
            "memory": {"needed": max(needed, topology.chip.memory or 0)},
            "message": program.out_of_memory,
            **_cost(program),
        }
    # Reserved are arguments, outputs that are not aliased to arguments, and temporaries with the gaps between them.
    total = program.arguments + program.outputs - program.aliased + program.temporary
    plan: Plan = {
        "fits": topology.chip.memory is None or total <= topology.chip.memory,
        "memory": {
            "arguments": program.arguments,
            "new_outputs": program.outputs - program.aliased,
            "temporary": program.temporary,
            "total": total,
            "peak_alive": program.peak,
        },
        "lowered_sha256": program.lowered,
        **_cost(program),
    }
    if not program.text:
        return plan
    rates = gpu_time.rates(topology) if topology.chip.platform == "gpu" else None
    analysis = hlo_cost.analyze(program.text, rates)
    prediction = estimate.predict(analysis, topology)
    plan |= {
        "flops": analysis.flops,
        "cycles": analysis.cycles(),
        "loops": [loop._asdict() for loop in analysis.loops],
        "collectives": _collectives(analysis, topology),
        "slices_bytes": analysis.slices_bytes,
        "custom_calls": analysis.custom_calls,
        "tensors": [tensor._asdict() for tensor in analysis.tensors],
        "slowest": _slowest(analysis),
    }
    if prediction:
        plan["time"] = prediction._asdict()
        if is_train:
            plan["time"]["mfu"] = estimate.mfu(config, topology, prediction.seconds)
            plan["time"]["tokens_per_second"] = estimate.tokens_per_step(config) / prediction.seconds
    return plan


def _cost(program: compiler.Program) -> Plan:
    """Cost of compiling on this machine."""
    return {
        "compile_seconds": program.seconds,
        "compile_cpu_seconds": program.cpu_seconds,
        "compile_resident": program.resident,
    }


def _collectives(analysis: hlo_cost.Analysis, topology: Topology) -> list[Plan]:
    """Runs, bytes and exposed time per step, by kind of collective, in loops or not, asynchronous or not, and group."""
    rows: dict[tuple, Plan] = {}
    for each in analysis.collectives:
        key = (each.kind, each.in_loop, each.asynchronous, each.group)
        row = rows.setdefault(
            key,
            dict(zip(("kind", "in_loop", "asynchronous", "group"), key, strict=True))
            | {"static": 0, "runs": 0, "bytes": 0, "seconds": 0.0, "exposed_seconds": 0.0},
        )
        row["static"] += 1
        row["runs"] += each.runs
        row["bytes"] += each.runs * each.bytes
        if topology.chip.ici:
            row["seconds"] += each.runs * estimate.wire_seconds(each, topology)
            row["exposed_seconds"] += estimate.exposed_seconds(each, topology)
    return sorted(rows.values(), key=lambda row: -row["bytes"])


def _slowest(analysis: hlo_cost.Analysis) -> list[Plan]:
    """The 20 source locations of the model that take most cycles."""
    by_source: dict[tuple[str, str], Plan] = defaultdict(lambda: {"cycles": 0.0, "flops": 0.0, "runs": 0})
    for item in analysis.work:
        row = by_source[item.category, item.source]
        row["cycles"] += item.cycles * item.runs
        row["flops"] += item.flops * item.runs
        row["runs"] += item.runs
    rows = [{"category": category, "source": source, **row} for (category, source), row in by_source.items()]
    return sorted(rows, key=lambda row: (-row["cycles"], -row["flops"]))[:20]


def _candidate_row(candidate: search.Candidate) -> Plan:
    return {
        "settings": list(candidate.settings),
        "memory": candidate.memory,
        "flops": candidate.flops,
        "seconds": candidate.seconds,
    }


def _compile_candidate(
    candidate: search.Candidate, topology: Topology, log: Callable[[str], None], names: tuple[str, ...]
) -> Plan:
    """A candidate with memory and time of its compiled train step; it fits if all the named steps fit."""
    row = _candidate_row(candidate)
    log(f"compiling the {' and '.join(names)} step with {' '.join(candidate.settings) or 'the settings as they are'}")
    try:
        programs = compiler.compile_steps(candidate.config, topology, names)
    except UserError as error:  # the compiler refuses these settings; others may work
        log(str(error))
        return row | {"compiled": {"memory": {"needed": 0}, "flops": None, "time": None, "fits": False}}
    compiled = {
        name: describe_program(candidate.config, topology, program, candidate.persistent, is_train=name == "train")
        for name, program in programs.items()
    }
    row["compiled"] = {name: compiled["train"].get(name) for name in ("memory", "flops", "time")}
    row["compiled"]["fits"] = all(step["fits"] for step in compiled.values())
    return row


def _nearest(
    config: Config,
    topology: Topology,
    factor: float,
    number: int,
    steps: tuple[str, ...],
    log: Callable[[str], None],
) -> list[Plan]:
    """Settings that fit: first the compiled ones (only the last of them can fit), then others by their estimate.

    Args:
        config: does not fit; resolved.
        topology: the machine.
        factor: memory of the compiled program over its estimate.
        number: maximum number of settings that are compiled.
        steps: compiled for each of them.
        log: prints progress.
    """
    candidates, rows, tried = search.list_candidates(config, topology), [], set()

    def untried() -> list[search.Candidate]:
        return [each for each in search.nearest(config, candidates, topology, factor) if each.settings not in tried]

    while len(rows) < number and (best := next(iter(untried()), None)):
        rows.append(_compile_candidate(best, topology, log, steps))
        tried.add(best.settings)
        compiled = rows[-1]["compiled"]
        if compiled["fits"]:
            break
        # The estimate was too low again: correct it by the memory that this program needs.
        factor = max(factor, (compiled["memory"].get("total") or compiled["memory"]["needed"]) / best.memory)
    return rows + [_candidate_row(each) for each in untried()]


def _search(config: Config, topology: Topology, number: int, log: Callable[[str], None]) -> list[Plan]:
    front = search.pareto_front(search.list_candidates(config, topology), topology.chip.memory)
    compiled = [_compile_candidate(candidate, topology, log, ("train", "eval")) for candidate in front[:number]]
    return compiled + [_candidate_row(candidate) for candidate in front[number:]]


def _run(config: Config, topology: Topology, plan: Plan, options: PlanOptions) -> Plan:
    """Steps, days, chip-hours and cost of the run, without evaluation and checkpoints."""
    per_step = estimate.tokens_per_step(config)
    steps = config.train.num_steps if options.tokens is None else -(-options.tokens // per_step)
    run: Plan = {"tokens_per_step": per_step, "steps": int(steps), "tokens": int(steps * per_step)}
    run["num_steps"] = config.train.num_steps  # of the learning-rate schedule
    seconds = plan.get("train", {}).get("time", {}).get("seconds")
    if options.quick:
        seconds = plan["quick"]["seconds"]
    if seconds is None:
        return run
    chip_hours = steps * seconds / 3600 * topology.num_devices
    run |= {"step_seconds": seconds, "days": steps * seconds / 86400, "chip_hours": chip_hours}
    return run if options.price is None else run | {"cost": chip_hours * options.price}
