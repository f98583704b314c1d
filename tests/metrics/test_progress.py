"""How far work is, on standard error: lines off a terminal, a bar on one."""

import os
import pty
import subprocess
import sys

from t5like.metrics import progress
from t5like.metrics.progress import Progress, status

VALUES = {"train/loss": 4.8123, "train/tokens_per_second": 31204.4, "train/mfu": 0.451}


def test_off_a_terminal_there_is_one_plain_line_per_interval_and_one_at_the_end(capsys):
    with Progress(25, log_every=10) as bar:
        for step in range(1, 26):
            early = step < 15
            bar.update(step, VALUES if early else {"train/loss": 4.0}, seconds_left=3692 if early else 92.4)
        bar.note("held-out loss 4.1")
    assert capsys.readouterr().err.splitlines() == [
        "step 10/25  loss 4.812  31,204 tokens/s  mfu 45.1 %  left 1:01:32",
        "step 20/25  loss 4.000  31,204 tokens/s  mfu 45.1 %  left 1:32",
        "step 25/25  loss 4.000  31,204 tokens/s  mfu 45.1 %  left 1:32",
        "held-out loss 4.1",
    ]


def test_other_processes_show_nothing(capsys):
    with Progress(25, log_every=1, primary=False) as bar:
        bar.update(1, VALUES)
        bar.note("held-out loss 4.1")
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_there_is_a_bar_with_everything_and_standard_output_stays_clean():
    program = (
        "from t5like.metrics.progress import Progress\n"
        "with Progress(600, log_every=10) as progress:\n"
        f"    progress.update(120, {VALUES}, 92)\n"
        "    progress.note('held-out loss 4.1')\n"
        "    print('for the pipe')\n"
    )
    terminal, end = pty.openpty()
    ran = subprocess.run(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=end,
        check=True,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(end)
    shown = b""
    try:
        while part := os.read(terminal, 1 << 16):
            shown += part
    except OSError:  # Linux reports the closed end of a terminal so
        pass
    os.close(terminal)
    assert "step 120/600  loss 4.812  31,204 tokens/s  mfu 45.1 %  left 1:32" in shown.decode()
    assert "held-out loss 4.1" in shown.decode() and ran.stdout == b"for the pipe\n"


def test_without_an_interval_a_line_comes_every_few_seconds_whole_and_without_control_codes(capsys, monkeypatch):
    now = iter(range(0, 1000, 2))  # two seconds from one question to the next
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    name = f"tokenizing text:{'x' * 200}: shard"
    with status("training a tokenizer"), Progress(9, unit=name) as shown:
        for step in range(1, 10):
            shown.update(step, {}, 60)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["training a tokenizer ...", *(f"{name} {step}/9  left 1:00" for step in (3, 6, 9))]
