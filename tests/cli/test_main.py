"""The command line: parsing, help, presets; a wrong command line is refused in one line with exit code 2."""

import dataclasses
import gc
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from t5like import __version__
from t5like.cli import flags
from t5like.cli.main import main
from t5like.config import field_help, loader
from t5like.config.schema import TokenizerConfig, sections
from t5like.interop.huggingface import families


def test_help_shows_each_command_and_its_flags(capsys):
    for arguments, words in (
        (["--help"], ("train", "prepare", "evaluate", "generate", "configs")),
        (["train", "--help"], ("--config", "--workdir", "--debug")),
        (["--version"], (f"t5like {__version__}\n",)),
    ):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        text = capsys.readouterr().out
        assert end.value.code == 0 and all(word in text for word in words)


def test_the_help_of_train_shows_every_field_with_its_default_values_and_comment():
    text = field_help.text()
    assert field_help.comments(TokenizerConfig)["path"].startswith("a SentencePiece model or")
    for prefix, cls in sections():
        names = {field.name for field in dataclasses.fields(cls) if not dataclasses.is_dataclass(field.default)}
        for name in names:
            assert f"\n--config.{prefix}{name}=" in text and field_help.comments(cls)[name], name
    assert (
        "\n--config.train.log_every=10\n    whole number, at least 1 and at most 2,147,483,647\n" in text
        and "\n--config.model.biases=false\n    true | false\n    biases on all dense layers\n" in text
        and "\n--config.model.norm=rms\n    rms | layer\n" in text
        and "\n--config.model.rotary.base=10000.0\n    number, at least 1 and at most 1e+12\n" in text
        and "\n---- data: texts, objectives, rows of a batch ----\n\n--config.data.source=" in text
    )


def test_presets_are_listed_with_a_line_each_and_found_by_name_from_anywhere(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = command("configs")
    folder = Path(__file__).parents[2] / "configs"
    files = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.py")}
    assert code == 0 and {line.split()[0] for line in out.splitlines()} == set(files) > {"tiny", "rl/code"}
    assert all(len(line.split()) > 4 for line in out.splitlines())
    for name, path in files.items():
        assert loader.load(name) == loader.load(path)


def test_a_command_collects_garbage_rarely(command):
    thresholds = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    try:
        assert command("configs")[0] == 0
        assert gc.isenabled() and gc.get_threshold()[0] > 10_000
    finally:
        gc.set_threshold(*thresholds)


def test_setup_names_presets_licence_author_and_description(monkeypatch):
    root, given = Path(__file__).parents[2], {}
    builder = SimpleNamespace(setup=given.update, find_packages=lambda include: ["t5like"])
    monkeypatch.setitem(sys.modules, "setuptools", builder)  # not installed where pip builds in a place of its own
    runpy.run_path(str(root / "setup.py"))
    folders = {"t5like.configs": "configs", "t5like.configs.rl": "configs/rl"}
    assert set(folders) < set(given["packages"]) and given["package_dir"] == folders
    assert given["license"] == "Apache-2.0" and given["version"] == __version__ and given["author"]
    assert all("Apache License" in (root / name).read_text() for name in given["license_files"])
    assert given["description"] and given["long_description"].startswith("# t5like")


def test_debug_shows_the_traceback_of_an_error(command):
    code, _, err = command("train", "--config=nowhere.py", "--workdir=/proc/nowhere", "--debug")
    assert (
        code == 2
        and "Traceback" in err
        and err.splitlines()[-1].startswith("t5like: --config=nowhere.py: no such file")
    )


def test_the_families_of_export_are_those_of_the_converter():
    assert flags.HF_FAMILIES == families.FAMILIES
