"""Merged log files."""

import io

from launch import process_logs
from launch.process_logs import MergedLogs


def test_lines_of_all_processes_have_their_number(tmp_path):
    paths, stream = [tmp_path / "0", tmp_path / "1"], io.StringIO()
    logs = MergedLogs(paths, stream)
    logs.poll()  # no file yet
    paths[0].write_text("a\nincomplete")
    paths[1].write_text("b\n")
    logs.poll()
    assert stream.getvalue() == "[0] a\n[1] b\n"
    with open(paths[0], "a") as file:
        file.write(" no more\nlast")
    logs.poll(last=True)
    assert stream.getvalue().splitlines()[2:] == ["[0] incomplete no more", "[0] last"]


def test_only_what_is_appended_is_printed_after_a_restart(tmp_path):
    path, stream = tmp_path / "0", io.StringIO()
    path.write_text("before\n")
    logs = MergedLogs([path], stream, from_end=True)
    with open(path, "a") as file:
        file.write("after\n")
    logs.poll()
    assert stream.getvalue() == "[0] after\n"


def test_a_line_that_is_rewritten_is_printed_as_it_ends(tmp_path):
    path, stream = tmp_path / "0", io.StringIO()
    path.write_bytes(b"step 1\rstep 2\rstep 3\r\n\x1b[32mgreen\x1b[0m\nbad \xff\x07 tab\t.\n")
    MergedLogs([path], stream).poll()
    assert stream.getvalue() == "[0] step 3\n[0] green\n[0] bad \ufffd\\u0007 tab\t.\n"


def test_a_progress_bar_without_line_ends_is_printed_now_and_then(tmp_path, monkeypatch):
    path, stream, now = tmp_path / "0", io.StringIO(), [100.0]
    monkeypatch.setattr(process_logs.time, "monotonic", lambda: now[0])
    logs = MergedLogs([path], stream)
    for step in range(20):
        now[0] += 1
        with open(path, "a") as file:
            file.write(f"step {step}\r")
        logs.poll()
    assert stream.getvalue() == "[0] step 0\n[0] step 6\n[0] step 12\n[0] step 18\n"


def test_a_file_that_was_replaced_is_read_from_its_start(tmp_path):
    path, stream = tmp_path / "0", io.StringIO()
    logs = MergedLogs([path], stream)
    path.write_text("a long first line\n")
    logs.poll()
    path.write_text("b\n")
    logs.poll()
    assert stream.getvalue() == "[0] a long first line\n[0] b\n"
