"""Where the time of a run goes: every moment belongs to one part."""

import json

from t5like.metrics.time_spent import PARTS, TimeSpent
from t5like.metrics.writers import Writer, read, seconds_spent


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_every_moment_belongs_to_the_innermost_part_and_a_read_begins_anew():
    clock = Clock()
    spent = TimeSpent(clock)
    clock.now += 5
    spent.begin_steps()
    with spent.of("save"):
        clock.now += 2
        with spent.of("device"):
            clock.now += 1
        clock.now += 4
    clock.now += 3
    spent.add_undone(7.0)
    assert spent.read() == {
        "time/start": 5,
        "time/device": 1,
        "time/save": 6,
        "time/host": 3,
        "time/undone": 7,
    }
    clock.now += 1
    assert spent.read() == {"time/host": 1}


def test_time_of_lines_that_a_restart_removes_is_undone(tmp_path):
    writer = Writer(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, {"train/loss": 1.0, "time/device": 2.0, "time/host": 0.5})
    writer.close()
    assert Writer(tmp_path, step=1).undone_seconds == 5.0
    assert seconds_spent(read(tmp_path)) == 2.5


def test_a_run_measures_its_parts_on_each_line(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    spent = [{name.removeprefix("time/") for name in line if name.startswith("time/")} for line in lines]
    assert {"start", "evaluate", "device", "inputs", "host"} <= set.union(*spent) <= set(PARTS)
    assert {"save", "evaluate"} <= spent[-1] and lines[-1]["step"] == 2  # the last checkpoint is counted too
    names = [(line["step"], name) for line in lines for name in line if name != "step"]
    assert len(names) == len(set(names))
