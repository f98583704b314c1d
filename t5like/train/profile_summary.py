"""Says in words where the time of a profile went: kinds of operations, collectives, waiting for data or for the host.

At each instant of the profiled steps a device is in one state, so that the shares of the states add up to 1:

    computing      operations that run at the same time, on several threads or streams, share the instant
    collective     exposed: nothing is computed meanwhile; otherwise it is overlapped, and counts as computing
    transfer       copies in the background while nothing else runs
    in programs    a program runs, but none of its operations: control flow, threads that wait for each other
    waiting        nothing runs: for the next batch (data wait), for evaluation and checkpoints, or else for the host

A run writes the summary beside its trace, as summary.txt.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jax.stages import Compiled

from t5like.distributed import processes
from t5like.io.atomic import replace_file
from t5like.plan.operation_kinds import COLLECTIVE, CONTROL, Program
from t5like.train.trace import DeviceTrace, Event, Trace, read

SUMMARY = "summary.txt"
OTHER_PROGRAM = "other program"
TRANSFER, IN_PROGRAM = "transfer", "in programs"
DATA_WAIT, PAUSED, HOST_GAP = "data wait", "evaluation, checkpoints", "host gap"
_PAUSES = {"evaluate", "save", "pauses"}  # parts of `metrics.time_spent`, as is "data"
MEANING = {
    "matmul": "matrix products, with what is fused into them",
    "attention": "scores, softmax, weighted values, position bias",
    "elementwise": "norms, activations, the loss, other fusions",
    "optimizer": "updates, gradient norm",
    "gather, scatter": "embedding look-ups and their gradients",
    "copy": "transposes, slices, changes of layout",
    OTHER_PROGRAM: "not the train step: evaluation, statistics, sampling in t5like rl",
    COLLECTIVE: "exposed: nothing is computed meanwhile",
    TRANSFER: "copies while nothing else runs",
    IN_PROGRAM: "between operations: control flow, waiting threads",
    DATA_WAIT: "the device is idle, and the loop waits for the next batch",
    PAUSED: "the device is idle in an evaluation, a checkpoint or a check",
    HOST_GAP: "the device is idle between programs",
}


class Slow(NamedTuple):
    """An operation that takes long."""

    share: float  # of the time
    seconds: float  # per step
    name: str  # of the instruction
    kind: str
    op_name: str
    source: str  # file:line in function; empty if unknown


class Summary(NamedTuple):
    """Where the time of some steps went, as a mean over devices.

    Attributes:
        first, last: the steps.
        seconds: of one step.
        devices: their number, and the name of the first.
        shares: of the time by state (`MEANING`); they add up to 1.
        overlapped: share of the time in which collectives run beside computation.
        slowest: the five operations with the largest share.
    """

    first: int
    last: int
    seconds: float
    devices: tuple[int, str]
    shares: dict[str, float]
    overlapped: float
    slowest: tuple[Slow, ...]


def summarize(trace: Trace, program: Program, module: str = "jit_train_step") -> Summary:
    """Compute the summary of a trace.

    Args:
        trace: of at least one step.
        program: the compiled train step.
        module: its name in the trace.

    Raises:
        ValueError: the trace has no step, or no operation.
    """
    first = min(trace.steps, default=None)
    operations = [event for device in trace.devices for line in device.lines for event in line]
    if first is None or not operations:
        raise ValueError("the trace has no step" if first is None else "the trace has no operation of a device")
    last = max(trace.steps)
    # The last step of the trace is cut off if it is the one after the three.
    end = trace.steps[last] if last > first else max(event.end for event in operations)
    last = max(last - 1, first)
    begin, count = trace.steps[first], last - first + 1
    states, slow, overlapped = defaultdict(float), defaultdict(float), 0.0
    for device in trace.devices:
        kind_of = lambda event: _kind(event, program, module)
        for duration, state, names, beside in _instants(device, trace.activities, begin, end, kind_of):
            states[state] += duration
            overlapped += duration * beside
            for name in names:
                slow[name] += duration / len(names)
    total = (end - begin) * len(trace.devices)
    shares = {state: states[state] / total for state in MEANING if states[state]}
    slowest = sorted(slow.items(), key=lambda item: -item[1])[:5]
    seconds = (end - begin) / count / 1e9
    return Summary(
        first,
        last,
        seconds,
        (len(trace.devices), trace.devices[0].name),
        shares,
        overlapped / total,
        tuple(_slow(name, time / total, seconds, program) for name, time in slowest),
    )


def _kind(event: Event, program: Program, module: str) -> str:
    if event.module and event.module != module:
        return OTHER_PROGRAM
    operation = program.operation(event.name)
    return operation.kind if operation else OTHER_PROGRAM


def _slow(name: str, share: float, seconds: float, program: Program) -> Slow:
    operation = program.operation(name)
    return Slow(share, share * seconds, name, operation.kind, operation.op_name, operation.source)


def _innermost(events: Sequence[Event]) -> Iterator[Event]:
    """The events of a line without overlaps: while one runs inside another, only the inner one remains."""
    stack: list[Event] = []
    now = 0.0
    for event in [*sorted(events, key=lambda each: (each.start, -each.end)), None]:
        until = event.start if event else float("inf")
        while stack and now < until:
            top = stack[-1]
            end = min(top.end, until)
            if end > now:
                yield top._replace(start=now, end=end)
                now = end
            if top.end <= until:
                stack.pop()
        if event:
            stack.append(event)
            now = max(now, event.start)


def _instants(
    device: DeviceTrace, activities: Sequence[Event], begin: float, end: float, kind_of: Callable[[Event], str]
) -> Iterator[tuple[float, str, list[str], bool]]:
    """Each part of the time between two changes: its duration in ns, its state, operations, whether a collective runs
    beside computation. Operations that run at the same time get equal parts of it.
    """
    changes = []
    groups = (
        *(("run", _innermost(line)) for line in device.lines),
        *(("behind", line) for line in device.background),
        ("program", device.programs),
        ("host", activities),
    )
    for group, events in groups:
        for event in events:
            start, stop = max(event.start, begin), min(event.end, end)
            if start < stop:
                kind = kind_of(event) if group in ("run", "behind") else event.name
                changes += [(start, 1, group, kind, event.name), (stop, -1, group, kind, event.name)]
    active: dict[tuple[str, str, str], int] = defaultdict(int)
    now = begin
    for time, change, *key in [*sorted(changes), (end, 0, "", "", "")]:
        if time > now:
            yield from _states(time - now, [key for key, count in active.items() for _ in range(count)])
            now = time
        active[tuple(key)] += change


def _states(duration: float, active: Sequence[tuple[str, str, str]]) -> Iterator[tuple[float, str, list[str], bool]]:
    """The states of one part of the time; `active`: group, kind and name of the events in it."""
    computing = [(kind, name) for group, kind, name in active if group == "run" and kind not in (COLLECTIVE, CONTROL)]
    exchanging = [name for _, kind, name in active if kind == COLLECTIVE]
    groups, host = {group for group, _, _ in active}, {kind for group, kind, _ in active if group == "host"}
    for kind, name in computing:
        yield duration / len(computing), kind, [name] * (kind != OTHER_PROGRAM), bool(exchanging)
    if computing:
        return
    if exchanging:
        yield duration, COLLECTIVE, exchanging, False
    elif "behind" in groups:
        yield duration, TRANSFER, [], False
    elif groups & {"program", "run"}:
        yield duration, IN_PROGRAM, [], False
    else:
        yield duration, DATA_WAIT if "data" in host else PAUSED if host & _PAUSES else HOST_GAP, [], False


def lines(summary: Summary) -> list[str]:
    """The summary as text."""
    first, last, seconds, (count, name), shares, overlapped, slowest = summary
    devices = name if count == 1 else f"{count} devices, the first {name}"
    found = [
        f"profile    steps {first:,} to {last:,} on {devices}: {1000 * seconds:,.1f} ms a step",
        f"           {_verdict(summary)}",
        *(f"{100 * shares[state]:9.1f} %  {state:<24}{MEANING[state]}" for state in MEANING if state in shares),
    ]
    if overlapped or COLLECTIVE in shares:
        exposed = shares.get(COLLECTIVE, 0.0)
        found.append(
            f"           collectives run {100 * (exposed + overlapped):.1f} % of the time: {100 * exposed:.1f} % "
            f"exposed, {100 * overlapped:.1f} % beside computation"
        )
    found.append("           the slowest operations:")
    for slow in slowest:
        where = slow.source or "made by the compiler"
        found.append(f"{100 * slow.share:9.1f} %  {1000 * slow.seconds:,.2f} ms a step, {slow.kind}: {where}")
        found.append(f"             {slow.name}: {'/'.join(slow.op_name.split('/')[-4:])}")
    return found


def _verdict(summary: Summary) -> str:
    """What limits the speed, in one sentence."""
    of = lambda state: summary.shares.get(state, 0.0)
    text = lambda state: f"{100 * of(state):.0f} % of the time"
    if of(DATA_WAIT) >= 0.1:
        return f"data: the device waits for batches {text(DATA_WAIT)}; make the source or its objective faster"
    if of(PAUSED) + of(OTHER_PROGRAM) >= 0.3:
        share = 100 * (of(PAUSED) + of(OTHER_PROGRAM))
        return f"not the train step: evaluation, checkpoints, or sampling in t5like rl take {share:.0f} % of the time"
    if of(HOST_GAP) >= 0.1:
        return f"host: the device is idle between programs {text(HOST_GAP)}; larger batches make it busier"
    if of(COLLECTIVE) >= 0.15:
        return f"network: exposed collectives take {text(COLLECTIVE)}; t5like plan --search compares other meshes"
    busiest = max((state for state in summary.shares), key=of)
    return f"computation: the device is busy, most with {busiest} ({text(busiest)})"


def newest(workdir: Path) -> tuple[Path, str] | None:
    """The newest summary of a run directory, and its sentence on what limits the speed; None if there is none."""
    paths = sorted(workdir.glob(f"profile/plugins/profile/*/{SUMMARY}"))
    if not paths:
        return None
    _, verdict, *_ = [*paths[-1].read_text("utf-8", errors="replace").splitlines(), "", ""]
    return paths[-1], verdict.strip()


def explain(train_step: Compiled, show: Callable[[str], None]) -> Callable[[Path], None] | None:
    """What `metrics.profiler.Profiler` does with a trace: print its summary, and write it beside the trace.

    Args:
        train_step: the compiled train step.
        show: prints a line.

    Returns:
        a function that takes the path of a trace; None in all processes but the first, which summarizes its own trace.
    """

    def write(path: Path) -> None:
        found = lines(summarize(read(path), Program(train_step.as_text())))
        for line in found:
            show(line)
        replace_file(path.parent / SUMMARY, ("\n".join(found) + "\n").encode())

    return write if processes.is_primary() else None
