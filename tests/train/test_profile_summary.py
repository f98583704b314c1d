"""`train.profile_step`: where the time of a step went, in words."""

import re
import time

import pytest
from jax.profiler import ProfileData

from t5like.data.pipeline import Batches
from t5like.metrics.profiler import Profiler
from t5like.plan.operation_kinds import Program
from t5like.train import profile_summary, trace


def test_a_profile_names_slow_operations_and_a_slow_source(command, decoder_flags, tmp_path, monkeypatch):
    """One run whose source takes a second for each batch, as only the profile and `inspect run` know."""
    summaries, summarize, at = [], profile_summary.summarize, Batches.at
    slow = lambda self, *where: (self.heldout or time.sleep(1)) and None or at(self, *where)
    monkeypatch.setattr(Batches, "at", slow)
    keep = lambda *arguments: summaries.append(summarize(*arguments)) or summaries[-1]
    monkeypatch.setattr(profile_summary, "summarize", keep)
    settings = [f"--config.train.{name}={value}" for name, value in {"num_steps": 7, "profile_step": 2}.items()]
    code, _, printed = command("train", *decoder_flags, f"--workdir={tmp_path}/run", *settings)
    [summary], [path] = summaries, (tmp_path / "run/profile").rglob("summary.txt")
    written = path.read_text()
    assert code == 0 and written in printed
    assert (summary.first, summary.last) == (2, 4) and 0.5 < summary.seconds < 30
    assert sum(summary.shares.values()) == pytest.approx(1, abs=1e-9) and min(summary.shares.values()) > 0
    assert {"matmul", "attention", "elementwise", "optimizer"} <= summary.shares.keys()
    shares = re.findall(r"^ *([\d.]+) %  (?!\d)", written, re.MULTILINE)
    assert sum(map(float, shares)) == pytest.approx(100, abs=1)
    slowest = next(slow for slow in summary.slowest if slow.source)  # without one: the compiler made it
    assert re.fullmatch(r"t5like/[\w/]+\.py:\d+ in \S+", slowest.source) and len(summary.slowest) == 5
    assert slowest.source in written and f"{1000 * slowest.seconds:,.2f} ms" in written

    assert summary.shares["data wait"] > 0.1 and "data: the device waits for batches" in printed, summary
    _, shown, _ = command("inspect", "run", f"--workdir={tmp_path}/run")
    assert re.search(r"^profile +data: the device waits for batches .*summary\.txt$", shown, re.MULTILINE)


# A matmul, an all-reduce from its start to its end beside it, a reduction, and an operation of another program.
HLO = """HloModule jit_train_step

FileNames
1 "/home/me/t5like/model/mlp.py"

FunctionNames
1 "Mlp.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=31 end_line=31 column=1 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%fused (a: f32[8,8], b: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8] parameter(0)
  %b = f32[8,8] parameter(1)
  ROOT %dot.1 = f32[8,8] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%x, %y)
}

ENTRY %main (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8] parameter(0)
  %all-reduce-start.1 = f32[8,8] all-reduce-start(%p), replica_groups={{0,1}}, to_apply=%sum
  %fusion.1 = f32[8,8] fusion(%p, %p), kind=kOutput, calls=%fused, metadata={op_name="jit(train_step)/mlp/dot_general" stack_frame_id=1}
  %all-reduce-done.1 = f32[8,8] all-reduce-done(%all-reduce-start.1)
  ROOT %copy.1 = f32[8,8] copy(%all-reduce-done.1)
}
"""  # noqa: E501


def plane(name: str, lines: dict[str, list[tuple[str, int, int]]], stats: dict[str, str] | None = None) -> str:
    """A plane in protobuf's text format; events are (name, start, end) in microseconds."""
    names = sorted({event[0] for events in lines.values() for event in events})
    ids = {name: number for number, name in enumerate(names, 1)}
    stat_ids = {name: number for number, name in enumerate(stats or {}, 1)}
    shown = lambda event: "".join(
        f' stats {{ metadata_id: {stat_ids[stat]} str_value: "{event if value == "NAME" else value}" }}'
        for stat, value in (stats or {}).items()
    )
    text = f'planes {{ name: "{name}"\n'
    for number, (line, events) in enumerate(lines.items(), 1):
        text += f'lines {{ id: {number} name: "{line}" timestamp_ns: 1000\n'
        for event, start, end in events:
            span = f"offset_ps: {start * 10**6} duration_ps: {(end - start) * 10**6}"
            text += f"events {{ metadata_id: {ids[event]} {span}{shown(event)} }}\n"
        text += "}\n"
    for event, number in ids.items():
        text += f'event_metadata {{ key: {number} value {{ id: {number} name: "{event}" }} }}\n'
    for stat, number in stat_ids.items():
        text += f'stat_metadata {{ key: {number} value {{ id: {number} name: "{stat}" }} }}\n'
    return text + "}\n"


LOOP = plane(
    "/host:CPU",
    {"main": [("t5like: step 5", 0, 0), ("t5like: data", 80, 95), ("t5like: step 6", 100, 100)]},
)


def test_a_trace_of_a_tpu_splits_collectives_into_exposed_and_overlapped():
    device = plane(
        "/device:TPU:0",
        {
            "XLA Modules": [("jit_train_step(123)", 10, 70), ("jit_other(4)", 72, 74)],
            "XLA Ops": [
                ("%fusion.1 = f32[8,8] fusion(%p, %p)", 10, 40),
                ("%all-reduce-done.1", 40, 50),
                ("%copy.1", 55, 70),
                ("%copy.1", 72, 74),
            ],
            "Async XLA Ops": [("%all-reduce-start.1", 20, 50)],
        },
    )
    read = trace.from_profile(ProfileData.from_text_proto(LOOP + device))
    summary = profile_summary.summarize(read, Program(HLO))
    expected = {"matmul": 0.3, "copy": 0.15, "other program": 0.02, "collective": 0.1, "in programs": 0.05}
    assert summary.shares == pytest.approx({**expected, "data wait": 0.15, "host gap": 0.23})
    assert summary.overlapped == pytest.approx(0.2) and (summary.first, summary.last) == (5, 5)
    assert summary.slowest[0][2:] == ("fusion.1", "matmul", "jit(train_step)/mlp/dot_general", SOURCE)


SOURCE = "t5like/model/mlp.py:31 in Mlp.__call__"


def test_a_trace_of_a_gpu_is_read_by_the_instructions_of_its_kernels():
    stats = {"hlo_op": "NAME", "hlo_module": "jit_train_step"}
    lines = {
        "Stream #7(Compute)": [("fusion.1", 10, 40), ("copy.1", 55, 70)],
        "Stream #9(Collectives)": [("all-reduce-start.1", 20, 50)],
    }
    device = plane("/device:GPU:0", lines, stats)
    read = trace.from_profile(ProfileData.from_text_proto(LOOP + device))
    summary = profile_summary.summarize(read, Program(HLO))
    expected = {"matmul": 0.3, "copy": 0.15, "collective": 0.1, "data wait": 0.15, "host gap": 0.3}
    assert summary.shares == pytest.approx(expected) and summary.overlapped == pytest.approx(0.2)
    assert profile_summary.lines(summary)[1].strip().startswith("data: the device waits for batches 15 %")

    faster = read._replace(activities=[])
    summary = profile_summary.summarize(faster, Program(HLO))  # the loop waits for the host instead
    assert "data wait" not in summary.shares and "host: the device is idle" in profile_summary.lines(summary)[1]


def test_a_trace_that_cannot_be_read_is_a_warning(tmp_path, capsys):
    def broken(path):
        raise ValueError("the trace has no step")

    profiler = Profiler(tmp_path, 1, broken)
    profiler.before(1)
    profiler.stop()
    assert "is incomplete: the trace has no step" in capsys.readouterr().err
