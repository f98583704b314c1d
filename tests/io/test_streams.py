"""Standard streams without a reader, on a full disk or closed; locales; home directories."""

import ast
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import one_device
import pytest
from conftest import write_text

from t5like.errors import ConfigError
from t5like.io import paths
from t5like.metrics.writers import read

ROOT = Path(__file__).parents[2]
ASCII = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "XLA_FLAGS": one_device.XLA_FLAGS}
CYRILLIC = "\u0431\u0430"

# ---- The streams of a process ----

BEGIN = "import os, sys, time; from t5like.io import streams; streams.guard()\n"
SHOW = f"{BEGIN}time.sleep(0.2); print('a'); sys.stdout.flush()"  # when the reader has left
GO_ON = f"{BEGIN}streams.ignore_lost_output(); time.sleep(0.2); print('a', flush=True); os.write(1, b'a')"
OPEN = f"{BEGIN}file = open('file', 'w'); print('a'); print('a', file=sys.stderr, flush=True)"
READ = f"{BEGIN}assert sys.stdin.read() == ''"
WRITE = f"{BEGIN}print({CYRILLIC!a})"


@pytest.mark.parametrize(
    "program, redirection, code, shown",
    [
        (SHOW, "| true", 1, "BrokenPipeError"),
        (SHOW, ">/dev/full", 1, "No space left on device"),
        (GO_ON, "| true", 0, ""),
        (GO_ON, ">/dev/full", 0, ""),
        (OPEN, "<&- >&- 2>&-", 0, ""),
        (OPEN, "2>/dev/full", 0, ""),
        (READ, "<&-", 0, ""),
        (WRITE, ">file", 0, ""),
        (f"import os; os.environ['PYTHONIOENCODING'] = 'ascii'; {WRITE}", ">file", 0, ""),
    ],
)
def test_a_stream_fails_once_and_a_closed_descriptor_is_not_reused(program, redirection, code, shown, tmp_path):
    (tmp_path / "program.py").write_text(program)
    shell = f"PYTHONPATH={ROOT} {sys.executable} program.py {redirection}; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", shell], cwd=tmp_path, env=ASCII, capture_output=True, text=True)
    assert ended.returncode == code and (shown in ended.stderr if shown else ended.stderr == ""), ended.stderr
    if program.endswith(WRITE):
        escaped = "PYTHONIOENCODING" in program
        assert (tmp_path / "file").read_text("utf-8") == (r"\u0431\u0430" if escaped else CYRILLIC) + "\n"
    if program == OPEN:
        assert not (tmp_path / "file").exists() or (tmp_path / "file").read_bytes() == b""


# ---- Commands ----

# Runs command lines in one process, each with its own streams: a file, a pipe without a reader, or closed.
COMMANDS = """
import json, os, sys
from t5like.cli.main import main

sys.modules["torch"] = None  # exports compare no logits, which takes long
codes = os.fdopen(os.dup(1), "w")
for argv, streams in json.loads(sys.argv[1]):
    sys.argv, sys.stdout, sys.stderr = ["t5like", *argv], sys.__stdout__, sys.__stderr__  # as at a start
    for number, name in enumerate(streams):
        if name == "closed":
            os.close(number)
        elif name == "no reader":
            reader, end = os.pipe()
            os.dup2(end, number)
            os.close(reader), os.close(end)
        else:
            end = os.open(name, os.O_RDWR | os.O_CREAT)
            os.dup2(end, number)
            os.close(end)
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    print(code, file=codes, flush=True)
"""


def test_commands_with_lost_streams_in_any_locale(decoder_flags, tmp_path):
    write_text(tmp_path / "latin.txt", seed=1)
    letters = str.maketrans({chr(97 + number): chr(0x430 + number) for number in range(26)})
    (tmp_path / "a.txt").write_text((tmp_path / "latin.txt").read_text().translate(letters), encoding="utf-8")
    data = [f"--config.data.source=text:{tmp_path}/a.txt", f"--config.data.cache_directory={tmp_path}/prepared"]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": CYRILLIC}) + "\n")
    run = f"--workdir={tmp_path}/run"
    generate = ["generate", run, f"--prompts_file={prompts}", "--max_new_tokens=4"]
    plan = ["plan", *decoder_flags, "--topology=cpu:8", "--quick"]
    full = "t5like: standard output can't be written: No space left on device; send it elsewhere\n"
    no_prompts = "t5like: standard input has no prompts; write one in each line, or use --prompt=TEXT\n"
    null, err = os.devnull, f"{tmp_path}/err"
    cases = [
        (
            ["train", *decoder_flags, *data, run, "--config.train.num_steps=2"],
            ["closed", "no reader", "/dev/full"],
            0,
            None,
        ),
        (generate, [null, f"{tmp_path}/answers", err], 0, ""),
        (generate, [null, "no reader", err], 141, ""),
        (generate, [null, "/dev/full", err], 4, full),
        (generate, [null, "closed", "closed"], 0, None),
        ([*generate, f"--output={tmp_path}/out.jsonl"], [null, "no reader", null], 0, None),
        (["generate", run], ["closed", "no reader", err], 3, no_prompts),
        (["evaluate", run], [null, "no reader", null], 0, None),
        (plan, [null, "no reader", err], 141, ""),
        (plan, [null, "/dev/full", err], 4, full),
        (["--help"], [null, "no reader", err], 141, ""),
        (["export", "--format=hf", run, f"--output={tmp_path}/hf"], [null, "no reader", "closed"], 0, None),
    ]
    own = lambda names, number: [f"{err}{number}" if name == err else name for name in names]
    given = json.dumps([[argv, own(names, number)] for number, (argv, names, *_) in enumerate(cases)])
    ended = subprocess.run(
        [sys.executable, "-c", COMMANDS, given], cwd=ROOT, env=ASCII, capture_output=True, text=True, timeout=120
    )
    codes = [int(line) for line in ended.stdout.split()]
    assert codes == [code for _, _, code, _ in cases], ended.stderr
    for number, (argv, _, _, line) in enumerate(cases):
        assert line is None or Path(f"{err}{number}").read_text() == line, argv
    workdir = tmp_path / "run"
    assert CYRILLIC[0] in (workdir / "samples.txt").read_text("utf-8")
    assert "eval/loss" in json.loads((workdir / "evaluations" / "2.json").read_text("utf-8"))
    assert {record["step"] for record in read(workdir)} == {0, 1, 2}
    answers = (tmp_path / "answers").read_text("utf-8")
    assert json.loads(answers)["prompt"] == CYRILLIC and (tmp_path / "out.jsonl").read_text("utf-8") == answers
    assert (tmp_path / "hf" / "config.json").exists()


def test_prompts_on_standard_input_that_are_not_utf8_are_refused(command, trained_decoder, monkeypatch, tmp_path):
    (tmp_path / "prompts").write_bytes(b"ba\n\xff\n")
    with (tmp_path / "prompts").open(encoding="utf-8") as file:
        monkeypatch.setattr("sys.stdin", file)
        code, _, err = command("generate", f"--workdir={trained_decoder}", "--max_new_tokens=4")
    assert code == 3 and err == "t5like: standard input is not UTF-8; convert it, or use --prompts_file\n"


# ---- Files are UTF-8 ----


def calls_without_an_encoding(path: Path) -> list[str]:
    """Calls that read or write text in the locale's encoding."""
    calls = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call) or "encoding" in (given := {keyword.arg for keyword in node.keywords}):
            continue
        owner = ast.unparse(node.func).rpartition(".")[0]
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        texts = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        wrong = {
            "read_text": not node.args,
            "write_text": len(node.args) < 2,
            "open": owner in ("", "path", "gzip", "io") and not any("b" in text for text in texts),
            "TextIOWrapper": True,
            "run": "text" in given,
            "Popen": "text" in given,
        }
        if wrong.get(name):
            calls.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    return calls


def test_every_file_of_text_is_read_and_written_as_utf8(tmp_path):
    (tmp_path / "wrong.py").write_text("open(a)\np.read_text()\np.write_text(t)\npath.open('w')\nrun(a, text=True)\n")
    assert len(calls_without_an_encoding(tmp_path / "wrong.py")) == 5
    files = [path for folder in ("t5like", "benchmarks", "configs") for path in (ROOT / folder).rglob("*.py")]
    assert [line for path in files for line in calls_without_an_encoding(path)] == []


# ---- Home directories ----


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """No HOME and a user id without an account, as in a container with --user; temporary files are in tmp_path."""

    def getpwuid(number):
        raise KeyError(number)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(paths, "_reported", set())


def test_without_a_home_directory_the_cache_is_in_the_temporary_directory(homeless, tmp_path, capsys, monkeypatch):
    own = tmp_path / f"t5like-{os.getuid()}"
    assert [paths.cache_directory("~/.cache/t5like") for _ in range(2)] == [own / "t5like"] * 2
    assert capsys.readouterr().err == (
        f"t5like: there is no home directory: the cache is in {own}; set HOME or data.cache_directory to keep it\n"
    )
    assert own.stat().st_mode & 0o777 == 0o700
    own.chmod(0o777)
    with pytest.raises(ConfigError, match="belongs to another user; set HOME or XDG_CACHE_HOME"):
        paths.cache_directory("~/.cache/t5like")
    monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}/xdg")
    assert paths.cache_directory("~/.cache/t5like") == tmp_path / "xdg" / "t5like"
    monkeypatch.setenv("HOME", "/proc/1")  # that nobody can write
    assert paths.cache_directory("~/.cache/t5like") == tmp_path / "xdg" / "t5like"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.cache_directory("~/.cache/t5like") == tmp_path / ".cache" / "t5like"


def test_without_a_home_directory_a_path_below_it_is_refused(homeless, command, flags, tmp_path):
    for arguments, path in (
        (["evaluate", "--workdir=~/run"], "~/run"),
        (["train", *flags, f"--workdir={tmp_path}/run", "--config.data.cache_directory=~/prepared"], "~/prepared"),
        (["train", *flags, f"--workdir={tmp_path}/run", "--config.tokenizer.path=~nobody_here/a"], "~nobody_here/a"),
        (["train", "--config=~/a.py", "--workdir=/proc/nowhere"], "~/a.py"),
    ):
        code, _, err = command(*arguments)
        line = f"{path} names a home directory that is not known; use an absolute path, or ./{path}"
        assert code == 2 and line in err.splitlines()[-1], (arguments, err)
    assert not (tmp_path / "run").exists()
