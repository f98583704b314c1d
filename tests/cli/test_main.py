"""The command line: parsing, help, presets; a wrong command line is refused in one line with exit code 2."""

import dataclasses
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


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: COMMAND; see t5like --help"),
        (["tarin"], "argument COMMAND: invalid choice: 'tarin'"),
        (["train"], "the following arguments are required: --workdir; see t5like train --help"),
        (
            ["train", "--workdir=/proc/nowhere", "--config.seed=3"],
            "--config is missing, and --workdir=/proc/nowhere has no run with a config; use --config=tiny",
        ),
        (
            ["train", "--config=tinny", "--workdir=/proc/nowhere"],
            "--config=tinny: no such file, and no preset; did you mean --config=tiny?",
        ),
        (
            ["train", "--config=configs/t5_smal.py", "--workdir=/proc/nowhere"],
            "--config=configs/t5_smal.py: no such file, and no preset; did you mean --config=t5_small?",
        ),
        (
            ["train", "--config=configs/tiny.py", "--workdir=/proc/nowhere", "--stesp=3"],
            "unrecognized arguments: --stesp=3",
        ),
        (
            ["train", "--config=configs/tiny.py", "--workdir=/proc/nowhere", "--config.seed"],
            "--config.seed needs a value, as in --config.seed=VALUE",
        ),
        (
            ["train", "--config=configs/tiny.py", "--workdir=/proc/nowhere", "--fake_devices=x"],
            "argument --fake_devices: invalid int value: 'x'",
        ),
        (
            ["train", "--config=configs/tiny.py", "--workdir=/proc/nowhere", "--fake_devices=0"],
            "--fake_devices=0 must be at least 1",
        ),
        (
            ["train", "--config=configs/tiny.py", "--workdir=/proc/nowhere", "--fake_devices=-1"],
            "--fake_devices=-1 must be at least 1",
        ),
        (
            ["train", "--config=tiny", "--workdir=/proc/nowhere", "--fake_devices=9999999"],
            "--fake_devices=9999999 must be at least 1 and at most 1,024; use --fake_devices=8",
        ),
        (
            ["export", "--format=stablehlo", "--workdir=/proc/nowhere", "--output=/proc/out", "--family=t5"],
            "--family goes with --format=hf, not --format=stablehlo; leave it out",
        ),
        (
            ["export", "--format=hf", "--workdir=/proc/nowhere", "--output=/proc/out", "--temperature=0"],
            "--temperature goes with --format=stablehlo, not --format=hf; leave it out",
        ),
        (
            ["import", "--format=hf", "--input=/proc/in", "--workdir=/proc/nowhere", "--config=configs/tiny.py"],
            "--config goes with --format=t5x, not --format=hf; leave it out",
        ),
        (
            ["evaluate", "--workdir=/proc/nowhere", "--config.seed=1"],
            "--config.seed can't be set for evaluate: it takes the run's own config",
        ),
        (["evaluate", "--workdir=/proc/nowhere", "--step=x"], "argument --step: invalid int value: 'x'"),
        (["evaluate", "--workdir=/proc/nowhere", "--limit=3"], "--limit goes with --tasks; use --tasks=NAME"),
        (["evaluate", "--workdir=/proc/nowhere", "--tasks=a,,b"], "--tasks=a,,b must be names with commas between"),
        (["evaluate", "--workdir=/proc/nowhere", "--tasks=a", "--limit=0"], "--limit=0 must be at least 1"),
        (
            ["evaluate", "--workdir=/proc/nowhere", "--tasks=a", "--tasks_dir=/proc/nowhere"],
            "--tasks_dir=/proc/nowhere is not a directory",
        ),
        (
            ["generate", "--workdir=/proc/nowhere", "--prompt=a", "--output=b.jsonl"],
            "--output=b.jsonl needs --prompts_file; without it, predictions are printed",
        ),
        (
            ["generate", "--workdir=/proc/nowhere", "--prompt=a", "--num_beams=4", "--temperature=1"],
            "--temperature=1 must be 0 with --num_beams=4; use --temperature=0",
        ),
        (
            ["generate", "--workdir=/proc/nowhere", "--prompt=a", "--num_returned=2"],
            "--num_returned=2 must be 1 with greedy decoding (--temperature=0 and --num_beams=1)",
        ),
        (
            ["generate", "--workdir=/proc/nowhere", "--prompt=a", "--top_p=0.9"],
            "--top_p=0.9 must be omitted where nothing is sampled (--temperature=0)",
        ),
        (
            ["generate", "--workdir=/proc/nowhere", "--prompt=a", "--max_new_tokens=0"],
            "--max_new_tokens=0 must be at least 1",
        ),
        (
            ["generate", "--workdir=/proc/nowhere", "--prompt=a", "--temperature=-1"],
            "--temperature=-1 must be at least 0",
        ),
        (
            ["generate", "--workdir=/proc/nowhere", "--prompt=a", "--temperature=nan"],
            "--temperature=nan must be at least 0",
        ),
        (["generate", "--workdir=/proc/nowhere", "--prompt=a", "--seed=-1"], "--seed=-1 must be at least 0"),
        (
            ["generate", "--workdir=/proc/nowhere", "--prompt=a", "--max_new_tokens=1000000000"],
            "--max_new_tokens=1000000000 must be at least 1 and at most 1,048,576; use --max_new_tokens=64",
        ),
        (
            ["generate", "--workdir=/proc/nowhere", "--prompt=a", "--temperature=1e-30"],
            "--temperature=1e-30 must be 0 or at least 1e-06; use --temperature=0",
        ),
        (
            ["export", "--format=stablehlo", "--workdir=/proc/a", "--output=/proc/b", "--prompt_length=1000000000"],
            "--prompt_length=1000000000 must be at least 1 and at most 1,048,576; use --prompt_length=64",
        ),
        (
            ["plan", "--config=tiny", "--topology=cpu:8", "--tokens=nan"],
            "--tokens=nan must be at least 1 and at most 1e+30; use --tokens=2e12",
        ),
        (
            ["plan", "--config=tiny", "--topology=cpu:8", "--price=-1"],
            "--price=-1 must be more than 0 and at most 1e+09; use --price=1.2",
        ),
        (["evaluate", "--workdir=/proc/nowhere", "--step=-1"], "--step=-1 must be at least 0"),
    ],
)
def test_a_wrong_command_line_is_refused(arguments, message, refused):
    code, said = refused(*arguments)
    assert code == 2 and said.startswith(message)


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
        "\n--config.train.log_every=10\n    at least 1 and at most 2,147,483,647\n    steps between lines " in text
        and "\n--config.model.biases=false\n    true | false\n    biases on all dense layers\n" in text
        and "\n--config.model.norm=rms\n    rms | layer\n" in text
        and "\n--config.model.rotary.base=10000.0\n    at least 1 and at most 1e+12\n" in text
    )


def test_presets_are_listed_with_a_line_each_and_found_by_name_from_anywhere(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = command("configs")
    files = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == [path.stem for path in files]
    assert all(len(line.split()) > 4 for line in out.splitlines())
    for path in files:
        assert loader.load(path.stem) == loader.load(path)


def test_setup_names_presets_licence_author_and_description(monkeypatch):
    root, given = Path(__file__).parents[2], {}
    builder = SimpleNamespace(setup=given.update, find_packages=lambda include: ["t5like"])
    monkeypatch.setitem(sys.modules, "setuptools", builder)  # not installed where pip builds in a place of its own
    runpy.run_path(str(root / "setup.py"))
    assert "t5like.configs" in given["packages"] and given["package_dir"] == {"t5like.configs": "configs"}
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
