"""A plan as text for a terminal of 100 columns."""

from t5like.plan.planner import Plan
from t5like.plan.topology import GPU_SHARE

GIB = 2**30
WIDTH = 60  # of the memory picture, columns
MAX_ROWS = 8  # of a table


def text(plan: Plan) -> str:
    """Format a plan."""
    parts = [_head(plan), _memory(plan), _speed(plan), _collectives(plan), _eval(plan), _quick(plan), _run(plan)]
    parts += [_nearest(plan), _search(plan), _arrays(plan), _tensors(plan), _checks(plan)]
    return "\n\n".join(part for part in parts if part)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def _table(title: str, header: tuple[str, ...], rows: list[tuple]) -> str:
    """A table with aligned columns; the last one is left-aligned text, the others are right-aligned numbers."""
    if not rows:
        return ""
    lines = [tuple(map(str, row)) for row in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    cells = lambda line: [each.rjust(width) for each, width in zip(line[:-1], widths, strict=False)] + [line[-1]]
    return "\n".join([title, *("  " + "  ".join(cells(line)).rstrip() for line in lines)])


def _head(plan: Plan) -> str:
    topology, model = plan["topology"], plan["model"]
    axes = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1) or "one device"
    lines = [
        f"plan       {topology['name']}, {topology['devices']:,} devices: {axes}",
        f"model      {model['parameters']:,} parameters, {model['dtype']}, remat {model['remat']}",
    ]
    if plan["settings"]:
        lines.append(f"set        {' '.join('--config.' + setting for setting in plan['settings'])}")
    return "\n".join(lines)


def _memory(plan: Plan) -> str:
    held, limit = plan["held"], plan["topology"]["memory"]
    train = plan.get("train")
    available = f" of {_gib(limit)}" if limit else ""
    available += f" ({GPU_SHARE} of a GPU, JAX's default share)" if plan["topology"]["platform"] == "gpu" else ""
    if train and not train["fits"] and "total" not in train["memory"]:
        needed = train["memory"]["needed"]
        return (
            f"memory     OUT OF MEMORY: a device would need {_gib(needed)}{available}, of which "
            f"{_gib(held['parameters'])} parameters, {_gib(held['optimizer'])} optimizer\n"
            f"           the compiler: {train['message'][:300]}"
        )
    if train:
        rest = train["memory"]["total"] - train["memory"]["arguments"]
        padding = max(train["memory"]["arguments"] - held["total"], 0)  # and the teacher of a distillation
        total, title = train["memory"]["total"], "compiled"
    else:
        rest, padding, total, title = plan["quick"]["activations"], 0, plan["quick"]["total"], "estimated"
    also = "teacher, " if any(check["name"] == "teacher" for check in plan["checks"]) else ""
    parts = [
        ("parameters", held["parameters"], "P"),
        ("optimizer state", held["optimizer"], "O"),
        ("moving average", held["average"], "M"),
        ("batch", held["batch"], "B"),
        (f"{also}padding of layouts", padding, "p"),
        ("activations, gradients, gathered weights", rest, "a"),
    ]
    fits = (train or plan["quick"])["fits"]
    verdict = "" if fits else "   OUT OF MEMORY" if total > limit else "   TOO CLOSE for an estimate"
    lines = [f"memory     {_gib(total)}{available} per device, {title}{verdict}"]
    scale = max(limit or 0, total, 1)
    bar = "".join(letter * round(WIDTH * size / scale) for _, size, letter in parts)
    lines.append(f"           [{bar.ljust(WIDTH, '.')}]")
    lines += [f"           {letter}  {_gib(size):>10}  {name}" for name, size, letter in parts if size]
    return "\n".join(lines)


def _speed(plan: Plan) -> str:
    train = plan.get("train")
    if not train or "total" not in train["memory"]:
        return ""
    if "flops" not in train:
        return "step       no time: jaxlib can't parse this compiler's program, so only its memory is known"
    model = plan["model_flops"]
    lines = [
        f"work       {train['flops'] / 1e12:.4g} TFLOP of matmuls per device and step, "
        f"{train['flops'] / model:.2f} x the model's {model / 1e12:.4g}"
    ]
    if time := train.get("time"):
        spread = 100 * time["uncertainty"]
        lines += [
            f"step       {time['seconds']:.3f} s (+-{spread:.0f} %), MFU {100 * time['mfu']:.1f} %, "
            f"{time['tokens_per_second']:,.0f} tokens/s",
            f"           compute {time['compute']:.3f} s, exposed collectives {time['exposed']:.3f} s, "
            f"kernels {time['custom']:.3f} s; their sum is {time['ratio']:g} x the predicted step",
        ]
        unit = "cycles" if plan["topology"]["platform"] == "tpu" else "time"  # of a GPU: by a roofline
        cycles = train["cycles"]
        shares = (
            f"{name} {100 * value / cycles['total']:.0f} %"
            for name, value in sorted(cycles.items(), key=lambda item: -item[1])
            if name != "total" and value
        )
        lines.append(f"           {unit}: {', '.join(shares)}")
        rows = [
            (f"{100 * row['cycles'] / cycles['total']:.1f} %", f"{row['runs']:,}", row["category"], row["source"][-90:])
            for row in train["slowest"][:MAX_ROWS]
        ]
        lines.append(_table(f"slowest    by {unit}", ("share", "runs", "kind", "source"), rows))
    else:
        lines.append("step       no time: this compiler estimates no cycles")
    return "\n".join(lines)


def _collectives(plan: Plan) -> str:
    rows = [
        (
            f"{row['bytes'] / 1e6:,.3f} MB",
            f"{row['runs']:,} x",
            f"{1e3 * row['exposed_seconds']:.1f} ms" if row["seconds"] else "-",
            f"{row['group']} devices",
            f"{row['kind']}, {'in loops' if row['in_loop'] else 'once'}, "
            + ("overlapped" if row["asynchronous"] else "exposed"),
        )
        for row in plan.get("train", {}).get("collectives", ())[: 2 * MAX_ROWS]
    ]
    table = _table("collectives of a step", ("bytes", "runs", "exposed", "group", "kind"), rows)
    if between := plan.get("train", {}).get("slices_bytes"):
        table += f"\n  {between / 1e9:.3f} GB per device to other slices"
    return table


def _eval(plan: Plan) -> str:
    step = plan.get("eval")
    if not step:
        return ""
    if "total" not in step["memory"]:
        return f"evaluation OUT OF MEMORY: {step['message'][:200]}"
    time = f", {step['time']['seconds']:.3f} s per batch" if "time" in step else ""
    verdict = "" if step["fits"] else "   OUT OF MEMORY"
    return f"evaluation {_gib(step['memory']['total'])} per device{time}{verdict}"


def _quick(plan: Plan) -> str:
    quick = plan["quick"]
    seconds = "" if quick["seconds"] is None else f", {quick['seconds']:.3f} s per step, MFU {100 * quick['mfu']:.1f} %"
    verdict = "" if quick["fits"] else ", which does not fit"
    line = f"estimate   without compiling: {_gib(quick['total'])} per device{verdict}{seconds}"
    if quick["seconds"] is not None and plan["topology"]["platform"] == "gpu":
        line += "\n           a GPU's times are not calibrated: no step of t5like was measured on one"
    train = plan.get("train")
    if train and "total" in train["memory"]:
        line += f"\n           {quick['total'] / train['memory']['total'] - 1:+.0%} of the compiled memory"
        if "time" in train:
            line += f", {quick['seconds'] / train['time']['seconds'] - 1:+.0%} of its time"
    return line


def _run(plan: Plan) -> str:
    run = plan["run"]
    line = f"run        {run['steps']:,} steps of {run['tokens_per_step']:,} tokens, {run['tokens'] / 1e9:,.4g} billion"
    if "days" in run:
        line += f": {run['days']:,.2f} days, {run['chip_hours']:,.0f} chip-hours"
    else:
        line += "; no days and no cost, because the step time on this topology is unknown"
    line += f", cost {run['cost']:,.0f}" if "cost" in run else ""
    if run["steps"] != run["num_steps"]:
        line += f"\n           train.num_steps is {run['num_steps']:,}: add --config.train.num_steps={run['steps']}"
    return line


def _candidates(title: str, rows: list[Plan]) -> str:
    lines = []
    for row in rows:
        compiled = row.get("compiled")
        memory = compiled["memory"].get("total") if compiled else None
        seconds = (compiled.get("time") or {}).get("seconds") if compiled else None
        verdict = "" if not compiled else f"{_gib(memory)}, fits" if compiled["fits"] else "does not fit"
        lines.append(
            (
                _gib(row["memory"]),
                f"{row['seconds']:.3f} s" if row["seconds"] else f"{row['flops'] / 1e12:.4g} TFLOP",
                verdict + (f", {seconds:.3f} s" if seconds else ""),
                " ".join("--config." + setting for setting in row["settings"]) or "as given",
            )
        )
    return _table(title, ("estimated", "step", "compiled", "settings"), lines)


def _nearest(plan: Plan) -> str:
    if "nearest" not in plan:
        return ""
    return _candidates("nearest    settings that fit", plan["nearest"]) or (
        "nearest    no mesh, remat policy or number of microbatches fits; use more devices or a smaller data.batch_size"
    )


def _search(plan: Plan) -> str:
    if "search" not in plan:
        return ""
    return _candidates(
        "search     Pareto front: no other setting has less memory and a shorter step", plan["search"]
    ) or (
        "search     no mesh, remat policy or number of microbatches fits; use more devices or a smaller data.batch_size"
    )


def _arrays(plan: Plan) -> str:
    arrays = [row for row in plan["arrays"] if not row["name"].startswith("batch/")]
    arrays.sort(key=lambda row: -row["bytes_per_device"])
    rows = [
        (_gib(row["bytes_per_device"]), "x".join(map(str, row["shape"])) or "()", row["split"], row["name"])
        for row in arrays[:MAX_ROWS]
    ]
    more = f"; {len(arrays) - MAX_ROWS} more with --json" if len(arrays) > MAX_ROWS else ""
    return _table(f"state      largest arrays and their sharding{more}", ("per device", "shape", "split", "name"), rows)


def _tensors(plan: Plan) -> str:
    rows = [
        (_gib(row["bytes"]), row["shape"], row["source"][-80:])
        for row in plan.get("train", {}).get("tensors", ())[:MAX_ROWS]
    ]
    return _table("tensors    largest values that the step computes", ("per device", "shape", "source"), rows)


def _checks(plan: Plan) -> str:
    marks = {"ok": "ok", "missing": "--", "slow": "slow", "wrong": "WRONG"}
    rows = [f"  {marks[row['state']]:5} {row['name']}: {row['text']}" for row in plan["checks"]]
    return "\n".join(["before the launch", *rows])
