"""Reads a profiler trace (``*.xplane.pb``): which operation each device ran when, and what the host did.

A trace consists of planes of lines of events. A TPU's plane has the lines "XLA Modules" (programs), "XLA Ops" and
"Async XLA Ops" (transfers from their start to their end); a GPU's has a line for each stream, with the instruction of
each kernel as a statistic; a CPU's operations are events of the host's threads. The loop's own events are those of
`metrics.profiler`.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from jax.profiler import ProfileData

from t5like.metrics.profiler import PREFIX, STEP

CPU_PROGRAM = "ThunkExecutor::Execute"  # begins the names of events that last as long as a program runs
HOST = "/host:CPU"


class Event(NamedTuple):
    """What a line of a trace shows from `start` to `end`, in ns."""

    start: float
    end: float
    name: str  # of an operation: its HLO instruction
    module: str = ""  # the program of an operation


class DeviceTrace(NamedTuple):
    """What one device did.

    Attributes:
        name: /device:TPU:0; of CPU devices together: /host:CPU.
        lines: operations that run one after another, or inside each other, on each thread, stream or core.
        background: transfers that the device makes while it runs `lines`.
        programs: the times in which a program ran, also between its operations.
    """

    name: str
    lines: list[list[Event]]
    background: list[list[Event]]
    programs: list[Event]


class Trace(NamedTuple):
    """A trace of one process.

    Attributes:
        devices: its devices; all devices of a CPU are one.
        activities: what the training loop did, by the names of `metrics.profiler`.
        steps: the time at which the loop began each step, in ns, by the number of the step.
    """

    devices: list[DeviceTrace]
    activities: list[Event]
    steps: dict[int, float]


def read(path: Path) -> Trace:
    """Read a trace."""
    return from_profile(ProfileData.from_file(str(path)))


def from_profile(profile: ProfileData) -> Trace:
    """The devices, activities and steps of a profile."""
    devices, activities, steps = [], [], {}
    for plane in profile.planes:
        if plane.name == HOST:
            host = DeviceTrace(HOST, [], [], [])
            for line in plane.lines:
                _add_host_line(line.events, host, activities, steps)
        elif re.fullmatch(r"/device:TPU:\d+", plane.name):
            devices.append(_tpu(plane))
        elif re.match(r"/device:GPU:\d+", plane.name):
            devices.append(_gpu(plane))
    return Trace(devices or [host], activities, steps)


def _add_host_line(events: Iterable, host: DeviceTrace, activities: list[Event], steps: dict[int, float]) -> None:
    """Sort the events of a thread into operations and programs of CPU devices, and what the loop did."""
    operations = []
    for event in events:
        if event.name.startswith(PREFIX + STEP):
            steps[int(event.name.rpartition(" ")[2])] = event.start_ns
        elif event.name.startswith(PREFIX):
            activities.append(Event(event.start_ns, event.end_ns, event.name.removeprefix(PREFIX)))
        elif event.name.startswith(CPU_PROGRAM):
            host.programs.append(Event(event.start_ns, event.end_ns, event.name))
        elif event.duration_ns and (operation := _kernel(event)):
            operations.append(operation)
    host.lines.append(operations)


def _kernel(event) -> Event | None:
    """An event as an operation; None if it belongs to no instruction of a program."""
    stats = dict(event.stats)
    if "hlo_op" not in stats:
        return None
    return Event(event.start_ns, event.end_ns, str(stats["hlo_op"]), str(stats.get("hlo_module", "")))


def _gpu(plane) -> DeviceTrace:
    lines, copies = [], []
    for line in plane.lines:
        events = list(line.events)
        lines.append([operation for operation in map(_kernel, events) if operation])
        copies.append(
            [Event(e.start_ns, e.end_ns, e.name) for e in events if e.name.startswith("Mem") and not _kernel(e)]
        )
    return DeviceTrace(plane.name, lines, copies, [])


def _tpu(plane) -> DeviceTrace:
    events = {line.name: list(line.events) for line in plane.lines}
    programs = [Event(e.start_ns, e.end_ns, e.name.partition("(")[0]) for e in events.get("XLA Modules", [])]
    operations = [_instruction(event) for event in events.get("XLA Ops", [])]
    programs.sort()
    return DeviceTrace(
        plane.name,
        [_in_programs(sorted(operations), programs)],
        [[_instruction(event) for event in events.get("Async XLA Ops", [])]],
        programs,
    )


def _instruction(event) -> Event:
    """An operation of a TPU. The name is that of its instruction, or the whole: %fusion.3 = bf16[8,128] fusion(...)."""
    return Event(event.start_ns, event.end_ns, re.match(r"%?([\w.\-]*)", event.name)[1])


def _in_programs(operations: list[Event], programs: list[Event]) -> list[Event]:
    """Operations with the names of their programs, both in the order of their starts."""
    found, number = [], 0
    for operation in operations:
        while number + 1 < len(programs) and programs[number + 1].start <= operation.start:
            number += 1
        module = programs[number].name if programs and programs[number].start <= operation.start else ""
        found.append(operation._replace(module=module))
    return found
