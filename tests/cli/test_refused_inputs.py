"""Wrong inputs of every kind are refused in one line, with their exit code, and nothing is written.

tests/golden/refusals.txt is the table: code, kind, name, and how the line begins. After a message has changed on
purpose, T5LIKE_RENEW_REFUSALS=1 writes it again, when this file is tested in one process.
"""

import os
import re
import shutil
from pathlib import Path

import bad_inputs
import pytest
from conftest import contents, main
from shared_directories import made_once

TABLE = Path(__file__).parents[1] / "golden" / "refusals.txt"
COMPARED = 160  # characters of a line
CODES = {"command line": {2}, "field": {2}, "config file": {2}, "data": {3}, "tokenizer": {3}, "checkpoint": {4}}
CODES |= {"model": {3, 4}, "rl": {2, 3, 4}}  # 3: its tokenizer; its records; 4: its first weights
RENEW = "T5LIKE_RENEW_REFUSALS"  # the environment variable with which the test writes the table


def cases() -> list[tuple[str, str]]:
    """Kind and name of every input."""
    fields = (*bad_inputs.FIELDS, *bad_inputs.FIELDS_TOGETHER)
    return [
        *(("command line", line) for line in bad_inputs.COMMAND_LINES),
        *(("field", name) for name in fields),
        *(("config file", name) for name in bad_inputs.CONFIG_FILES),
        *(("data", name) for name in bad_inputs.DATA),
        *(("tokenizer", name) for name in bad_inputs.TOKENIZERS),
        *(("checkpoint", name) for name in bad_inputs.CHECKPOINTS),
        *(("model", name) for name in bad_inputs.MODELS),
        *(("rl", name) for name in bad_inputs.RL),
    ]


def arranged(kind: str, name: str, folder: Path, flags: list[str], trained: Path, model: Path) -> list[str]:
    """Write the input into a folder; returns the command line that must refuse it. `flags`: those of its command."""
    run, cache = f"--workdir={folder}/run", f"--config.data.cache_directory={folder}/prepared"
    if kind == "command line":
        return name.split()
    if kind == "field":
        return ["train", *flags, *(f"--config.{part}" for part in name.split()), "--fake_devices=8", run]
    if kind == "rl":
        command, *fields = name.split()
        return [command, *flags, *(f"--config.{field}" for field in fields), run]
    if kind == "config file":
        file, content = bad_inputs.CONFIG_FILES[name]
        (folder / file).write_bytes(content)
        return ["train", f"--config={folder}/{file}", run]
    if kind == "data":
        arrange, fields = bad_inputs.DATA[name]
        arrange(folder)
        fields = {"source": f"jsonl:{folder}/a.jsonl", **fields}
        settings = [f"--config.data.{field}={value.replace('{}', str(folder))}" for field, value in fields.items()]
        return ["prepare", *flags, *settings, cache, run]
    if kind == "tokenizer":
        shutil.copy(trained / "tokenizer.model", folder / "good.model")
        bad_inputs.TOKENIZERS[name](folder)
        file = "t.json" if (folder / "t.json").exists() else "t.model"
        settings = [f"--config.tokenizer.path={folder}/{file}", "--config.tokenizer.vocab_size=500"]
        return ["prepare", *flags, *settings, cache, run]
    if kind == "checkpoint":
        shutil.copytree(trained, folder / "run")
        bad_inputs.CHECKPOINTS[name](folder / "run")
        if name in bad_inputs.DAMAGED:  # passed over unless it is named
            return ["evaluate", run, "--step=99" if name.startswith("a stray") else "--step=2"]
        return ["evaluate", run]
    shutil.copytree(model, folder / "in")
    bad_inputs.MODELS[name](folder / "in")
    return ["import", "--format=hf", f"--input={folder}/in", run]


@pytest.fixture(scope="session")
def model(trained, tmp_path_factory) -> Path:
    """A model directory of Hugging Face."""

    def export(directory: Path) -> None:
        assert main(["export", "--format=hf", f"--workdir={trained}", f"--output={directory}/model"]) == 0

    return made_once(tmp_path_factory, "exported", export) / "model"


def table() -> dict[tuple[str, str], tuple[int, str]]:
    """Kind and name -> exit code and the begin of the line."""
    rows = (re.split(r" \| ", line, maxsplit=3) for line in TABLE.read_text("utf-8").splitlines())
    return {(kind, name): (int(code), begin) for code, kind, name, begin in rows}


def test_the_table_has_every_input():
    if os.environ.get(RENEW):
        TABLE.write_text("", encoding="utf-8")
        return
    assert [*table()] == cases() and len(cases()) >= 200
    assert all(len(begin) > 20 for _, begin in table().values())


@pytest.mark.parametrize("kind, name", cases())
def test_a_wrong_input_is_refused(kind, name, refused, flags, rl_flags, trained, model, tmp_path):
    arguments = arranged(kind, name, tmp_path, rl_flags if kind == "rl" else flags, trained, model)
    before = contents(tmp_path)
    code, message = refused(*arguments)
    assert "\n" not in message and code in CODES[kind]
    if os.environ.get(RENEW):
        with TABLE.open("a", encoding="utf-8") as file:
            file.write(f"{code} | {kind} | {name} | {shown(message, tmp_path)}\n")
        return
    expected_code, begin = table()[kind, name]
    assert code == expected_code and shown(message, tmp_path).startswith(begin), message
    after = {path: value for path, value in contents(tmp_path).items() if not path.startswith("prepared/")}
    assert after == before and not [path for path in (tmp_path / "prepared").rglob(".*") if path.is_file()]


def shown(message: str, folder: Path) -> str:
    """The begin of a message, without what differs from run to run."""
    message = message.replace(str(folder), "FOLDER").replace(str(Path.cwd()), "HERE")
    message = re.sub(r"[^ :=]*/letters/", "", message)  # the data of `rl_flags`
    message = re.sub(r"another run \([0-9a-f]{8}", "another run (01234567", message)
    return message[:COMPARED].rstrip()


def test_a_data_directory_that_can_not_be_written_is_refused(refused, flags, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, said = refused(
        "train", *flags, f"--config.data.cache_directory={tmp_path}/file/prepared", f"--workdir={tmp_path}/run"
    )
    assert code == 4 and said.startswith(
        f"data.cache_directory={tmp_path}/file/prepared can't be used: Not a directory"
    )
    assert contents(tmp_path) == {"file": b"in the way"}
