"""Makes a plan: all that the report shows, as one JSON object. Bytes and FLOPs are per device, times in seconds."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from t5like.config.schema import Config
from t5like.errors import UserError
from t5like.metrics import flops
from t5like.plan import compile as compiler
from t5like.plan import estimate, hlo_cost, preflight, search
from t5like.plan.topology import Topology
from t5like.sharding import auto
from t5like.sharding import mesh as meshes

Plan = dict[str, Any]
COMPILED = 2  # settings at most that are compiled when those of the config do not fit: minutes each, of a big model


class PlanOptions(NamedTuple):
    """What the command line asks for."""

    quick: bool = False
    search: int | None = None  # how many of the best choices are compiled; None: no search
    tokens: float | None = None  # of the whole run
    price: float | None = None  # of a chip for an hour
    workdir: Path | None = None
    keep: Path | None = None  # where the compiled programs stay


def for_slices(config: Config, topology: Topology) -> Config:
    """The config with `mesh.slices` set, and `data` over them where it was 1, as training on slices needs it."""
    slices, data = topology.num_slices, config.mesh.data
    mesh = dataclasses.replace(config.mesh, slices=slices, data=slices if data == 1 else data)
    return dataclasses.replace(config, mesh=mesh)


def make(
    config: Config, topology: Topology, wishes: PlanOptions, say: Callable[[str], None]
) -> tuple[Plan, list[UserError]]:
    """Plan a run; also what `train` would stop with.

    Raises:
        UserError: the config does not go with the topology, or the step can't be compiled at all.
    """
    if not wishes.quick:
        compiler.check_installed(topology)
    asked = config
    config = auto.resolve_auto_for(for_slices(config, topology), topology.chip.platform)
    sizes = meshes.axis_sizes(config, topology.num_devices)
    shapes = estimate.shapes(config)
    held = estimate.persistent_memory(shapes, sizes)
    quick = estimate.quick(config, topology, held)
    checks = [*preflight.checks(asked, wishes.workdir), *_slow(topology, sizes)]
    plan: Plan = {
        "topology": _topology(topology),
        "mesh": sizes,
        "settings": list(search.settings(asked, config))
        + ([f"mesh.slices={config.mesh.slices}"] if asked.mesh.slices != config.mesh.slices else []),
        "model": {"parameters": _count(held), "dtype": config.model.dtype, "remat": config.model.remat},
        "model_flops": flops.model_flops(config) / topology.num_devices,
        "held": held._replace(leaves=())._asdict() | {"total": held.total},
        "quick": _quick(config, topology, quick),
        "arrays": [leaf._asdict() for leaf in held.leaves],
        "checks": [{"name": check.name, "state": check.state, "text": check.text} for check in checks],
    }
    del plan["held"]["leaves"]
    if wishes.quick and not plan["quick"]["fits"]:
        plan["nearest"] = _nearest(config, topology, 1.0, 0, (), say)
    if not wishes.quick:
        say(f"compiling the train and eval steps for {topology.name}; a big model takes minutes on any machine")
        programs = compiler.run(config, topology, ("train", "eval"), wishes.keep)
        for name, program in programs.items():
            plan[name] = of_program(config, topology, program, held.total, is_train=name == "train")
        if short := [plan[name]["memory"] for name in programs if not plan[name]["fits"]]:
            needed = max(memory.get("total") or memory["needed"] for memory in short)
            steps = ("train",) if plan["eval"]["fits"] else ("train", "eval")
            plan["nearest"] = _nearest(config, topology, max(1.0, needed / quick.total), COMPILED, steps, say)
    if wishes.search is not None:
        plan["search"] = _search(config, topology, 0 if wishes.quick else wishes.search, say)
    plan["run"] = _run(config, topology, plan, wishes)
    return plan, [check.error for check in checks if check.error]


def _slow(topology: Topology, sizes: dict[str, int]) -> list[preflight.Check]:
    if not (flat := estimate.flat_fsdp(topology, sizes["fsdp"])):
        return []
    use = f"--config.mesh.fsdp={flat} --config.mesh.data=-1"
    text = f"fsdp={sizes['fsdp']} lies along three axes of the torus, where libtpu gathers slowly; try {use}, along two"
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


def _count(held: estimate.PersistentMemory) -> int:
    return sum(leaf.bytes // 4 for leaf in held.leaves if leaf.name.startswith("params/"))  # all of them float32


def _quick(config: Config, topology: Topology, quick: estimate.Quick) -> Plan:
    plan = quick._asdict() | {"fits": search.fits(quick.total, topology.chip.memory)}
    return plan | ({"mfu": estimate.mfu(config, topology, quick.seconds)} if quick.seconds else {})


def of_program(config: Config, topology: Topology, program: compiler.Program, held: int, *, is_train: bool) -> Plan:
    """What a compiled step says of itself; held: bytes that are there beside its temporaries."""
    if program.out_of_memory:
        needed = program.needed + (held if "temporaries" in program.out_of_memory else 0)
        return {
            "fits": False,
            "memory": {"needed": max(needed, topology.chip.memory or 0)},
            "message": program.out_of_memory,
            **_cost(program),
        }
    # What is reserved: arguments, results that take no argument's place, and temporaries with the gaps between them.
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
    analysis = hlo_cost.analyze(program.text)
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
            plan["time"]["uncertainty"] = estimate.UNCERTAINTY
    return plan


def _cost(program: compiler.Program) -> Plan:
    """What compiling took on this machine."""
    return {
        "compile_seconds": program.seconds,
        "compile_cpu_seconds": program.cpu_seconds,
        "compile_resident": program.resident,
    }


def _collectives(analysis: hlo_cost.Analysis, topology: Topology) -> list[Plan]:
    """By kind, place, form and group: runs and bytes of a step, and what is waited for."""
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
    """The parts of the model that take most cycles, by where in the source they come from."""
    found: dict[tuple[str, str], Plan] = defaultdict(lambda: {"cycles": 0.0, "flops": 0.0, "runs": 0})
    for item in analysis.work:
        row = found[item.category, item.source]
        row["cycles"] += item.cycles * item.runs
        row["flops"] += item.flops * item.runs
        row["runs"] += item.runs
    rows = [{"category": category, "source": source, **row} for (category, source), row in found.items()]
    return sorted(rows, key=lambda row: (-row["cycles"], -row["flops"]))[:20]


def _choice(choice: search.Candidate) -> Plan:
    return {
        "settings": list(choice.settings),
        "memory": choice.memory,
        "flops": choice.flops,
        "seconds": choice.seconds,
    }


def _compile_choice(
    choice: search.Candidate, topology: Topology, say: Callable[[str], None], names: tuple[str, ...]
) -> Plan:
    """A choice with what the compiler says of its train step; it fits if all the named steps do."""
    row = _choice(choice)
    say(f"compiling the {' and '.join(names)} step with {' '.join(choice.settings) or 'the settings as they are'}")
    try:
        programs = compiler.run(choice.config, topology, names)
    except UserError as error:  # the compiler refuses these settings: others may do
        say(str(error))
        return row | {"compiled": {"memory": {"needed": 0}, "flops": None, "time": None, "fits": False}}
    compiled = {
        name: of_program(choice.config, topology, program, choice.held, is_train=name == "train")
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
    say: Callable[[str], None],
) -> list[Plan]:
    """Settings that fit: those that were compiled, the last of which does if any does, then others by the estimate.

    Args:
        config: what did not fit; settled.
        topology: the machine.
        factor: what the compiler needed over the estimate.
        number: of settings at most that are compiled.
        steps: those that are compiled of each.
        say: shows progress.
    """
    choices, rows, tried = search.list_candidates(config, topology), [], set()
    left = lambda: [each for each in search.nearest(config, choices, topology, factor) if each.settings not in tried]
    while len(rows) < number and (found := left()):
        rows.append(_compile_choice(found[0], topology, say, steps))
        tried.add(found[0].settings)
        compiled = rows[-1]["compiled"]
        if compiled["fits"]:
            break
        # The estimate was too low once more: what this one needed decides on the next.
        factor = max(factor, (compiled["memory"].get("total") or compiled["memory"]["needed"]) / found[0].memory)
    return rows + [_choice(each) for each in left()]


def _search(config: Config, topology: Topology, number: int, say: Callable[[str], None]) -> list[Plan]:
    front = search.pareto(search.list_candidates(config, topology), topology.chip.memory)
    compiled = [_compile_choice(choice, topology, say, ("train", "eval")) for choice in front[:number]]
    return compiled + [_choice(choice) for choice in front[number:]]


def _run(config: Config, topology: Topology, plan: Plan, wishes: PlanOptions) -> Plan:
    """The whole run: steps, days, chip-hours, cost. Evaluation and checkpoints are not in it."""
    per_step = estimate.tokens_per_step(config)
    steps = config.train.num_steps if wishes.tokens is None else -(-wishes.tokens // per_step)
    run: Plan = {"tokens_per_step": per_step, "steps": int(steps), "tokens": int(steps * per_step)}
    run["num_steps"] = config.train.num_steps  # those that the learning rate is for
    seconds = plan.get("train", {}).get("time", {}).get("seconds")
    if wishes.quick:
        seconds = plan["quick"]["seconds"]
    if seconds is None:
        return run
    chip_hours = steps * seconds / 3600 * topology.num_devices
    run |= {"step_seconds": seconds, "days": steps * seconds / 86400, "chip_hours": chip_hours}
    return run if wishes.price is None else run | {"cost": chip_hours * wishes.price}
