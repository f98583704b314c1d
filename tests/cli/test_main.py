"""The command line: what is refused, in one line with its exit code, and that a refusal leaves nothing behind."""

import dataclasses
import gzip
import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import contents, write_text

from t5like import __version__
from t5like.cli.main import main
from t5like.config import field_help, loader
from t5like.config.schema import TokenizerConfig, sections


@pytest.fixture
def refused(command):
    """Run a command line that must be refused: checks the form, gives (exit code, message)."""

    def run(*arguments) -> tuple[int, str]:
        code, _, err = command(*arguments)
        *before, last = err.splitlines()
        assert last.startswith("t5like: ") and not re.search("Traceback|WARNING|Error\\b", "\n".join(before)), err
        return code, last.removeprefix("t5like: ")

    return run


# ---- The command line itself ----


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: COMMAND; see t5like --help"),
        (["tarin"], "argument COMMAND: invalid choice: 'tarin'"),
        (["train"], "the following arguments are required: --workdir; see t5like train --help"),
        (
            ["train", "--workdir=/proc/nowhere", "--config.seed=3"],
            "--config is missing, and --workdir=/proc/nowhere holds no run that has one; use --config=tiny",
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
            "--tasks_dir=/proc/nowhere is no directory",
        ),
        (
            ["generate", "--workdir=/proc/nowhere", "--prompt=a", "--output=b.jsonl"],
            "--output=b.jsonl needs --prompts_file; without, answers are printed",
        ),
        (
            ["generate", "--workdir=/proc/nowhere", "--prompt=a", "--num_beams=4", "--temperature=1"],
            "--temperature=1 must be 0 with --num_beams=4; use --temperature=0",
        ),
        (
            ["generate", "--workdir=/proc/nowhere", "--prompt=a", "--num_returned=2"],
            "--num_returned=2 must be 1 where the likeliest token is taken (--temperature=0 and --num_beams=1)",
        ),
        (
            ["generate", "--workdir=/proc/nowhere", "--prompt=a", "--top_p=0.9"],
            "--top_p=0.9 must be left away where nothing is sampled (--temperature=0)",
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
def test_a_command_line_that_is_not_understood_is_refused(arguments, message, refused):
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
        "\n--config.train.log_every=10\n    at least 1 and at most 2,147,483,647\n    steps\n" in text
        and "\n--config.model.biases=false\n    true | false\n    on every dense layer\n" in text
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


# ---- A run that can't begin says why, and leaves nothing behind ----


CONFIGS = {
    "unknown key": (
        "--config.train.num_step=3",
        "--config.train.num_step: there is no field 'num_step'; did you mean 'num_steps'?",
    ),
    "unknown section": (
        "--config.trian.num_steps=3",
        "--config.trian.num_steps: there is no field 'trian'; did you mean 'train'?",
    ),
    "wrong type": ("--config.train.num_steps=many", "train.num_steps='many' must be a whole number"),
    "unknown choice": (
        "--config.model.mlp=rely",
        "model.mlp='rely' must be one of relu, gelu, gelu_exact, gated_gelu, gated_silu; did you mean 'relu'?",
    ),
    "mesh": ("--config.mesh.fsdp=3", "mesh data -1 x fsdp 3 x tensor 1 x context 1 does not fit 8 devices"),
    "rows": (
        "--config.data.batch_size=12",
        "data.batch_size=12 must be a multiple of 8 (data 8 x fsdp 1 x train.microbatches 1); use 8 or 16",
    ),
    "heads": ("--config.mesh.tensor=4", "mesh.tensor=4 must divide model.num_heads=2; use mesh.tensor=2"),
    "objective": (
        "--config.data.objective=mlm",
        "data.objective=mlm needs model.architecture=encoder, not encoder_decoder",
    ),
    "sentinels": (
        "--config.tokenizer.num_sentinels=1",
        "tokenizer.num_sentinels=1 must be at least 2, one for each masked span of a row; use 2",
    ),
    "targets": ("--config.data.targets_length=5", "data.targets_length=5 must be at least "),
    "source": ("--config.data.source=txt:a", "data.source='txt:a' must be one of python_stdlib, tfds:NAME, text:GLOB"),
    "no file": ("--config=nowhere.py", "--config=nowhere.py: no such file, and no preset; use --config=tiny"),
    "memory of the model": (
        "--config.model.mlp_dim=16000000 --config.model.model_dim=1048576",
        "model.num_layers=1, model.model_dim=1048576, model.mlp_dim=16000000, model.num_heads=2, model.head_dim=16, "
        "tokenizer.vocab_size=400: a model of 100,66",
    ),
    "memory of the batch": (
        "--config.data.batch_size=16777216 --config.data.inputs_length=4096 --config.data.targets_length=4096 "
        "--config.tokenizer.num_sentinels=999 --config.tokenizer.vocab_size=2000",
        "data.batch_size=16777216, data.inputs_length=4096, data.targets_length=4096, train.microbatches=1, ",
    ),
    "compiler": (
        "--config.train.compiler_options=xla_nothing=1",
        "train.compiler_options: the compiler refuses one (",
    ),
    "beyond 64 bits": (
        "--config.train.num_steps=99999999999999999999",
        "train.num_steps=99999999999999999999 must be at least 1 and at most 2,147,483,647; use 524288",
    ),
}


@pytest.mark.parametrize("flag, message", CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_can_not_run_is_refused(flag, message, refused, flags, tmp_path):
    code, said = refused("train", *flags, *flag.split(), f"--workdir={tmp_path}/run")
    assert code == 2 and said.startswith(message), said
    assert not (tmp_path / "run").exists()


def write_lines(path: Path, *lines: str) -> Path:
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.writelines(line + "\n" for line in lines)
    return path


def missing_file(tmp_path):
    return {"data.source": f"text:{tmp_path}/*.text"}, f"data.source=text:{tmp_path}/*.text: no file matches"


def empty_file(tmp_path):
    (tmp_path / "a.txt").touch()
    return {"data.source": f"text:{tmp_path}/a.txt"}, f"{tmp_path}/a.txt is empty"


def bad_json_line(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl.gz", *['{"text": "a good line"}'] * 40, "", '{"text": "half', '{"text": "c"}'
    )
    return {"data.source": f"jsonl:{path}"}, f"{path}:42: not valid JSON ("


def no_text_field(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", '{"body": "a"}', '{"body": "b"}')
    return {"data.source": f"jsonl:{path}"}, f"{path}:1: there is no field 'text'; set data.text_field to one of 'body'"


def too_little_text(tmp_path):
    write_text(tmp_path / "a.txt", lines=300)
    return (
        {
            "data.source": f"text:{tmp_path}/a.txt",
            "data.inputs_length": 20_000,
            "data.targets_length": 5_000,
            "tokenizer.num_sentinels": 3,
            "data.mean_span_length": 3_000,
        },
        f"data.source=text:{tmp_path}/a.txt has ",
    )


def too_little_text_for_a_tokenizer(tmp_path):
    write_text(tmp_path / "a.txt", lines=300)
    return {
        "data.source": f"text:{tmp_path}/a.txt",
        "tokenizer.vocab_size": 8000,
    }, "tokenizer.vocab_size=8000 is too large for so little text"


def nothing_left_to_hold_out(tmp_path):
    path = write_lines(tmp_path / "a.txt", "the same", "the same", "the same")
    return (
        {"data.source": f"text:{path}", "data.text_documents": "line"},
        f"data.source=text:{path} has only one document (or copies of one), and one has to be held out",
    )


def no_sentencepiece_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"no model at all")
    return {
        "tokenizer.path": tmp_path / "tokenizer.model"
    }, f"tokenizer.path={tmp_path}/tokenizer.model is not a SentencePiece model"


def missing_tokenizer(tmp_path):
    return {
        "tokenizer.path": tmp_path / "tokenizer.model"
    }, f"tokenizer.path={tmp_path}/tokenizer.model can't be read: No such file"


@pytest.mark.parametrize(
    "problem",
    [
        missing_file,
        empty_file,
        bad_json_line,
        no_text_field,
        too_little_text,
        nothing_left_to_hold_out,
        too_little_text_for_a_tokenizer,
        no_sentencepiece_model,
        missing_tokenizer,
    ],
    ids=lambda problem: problem.__name__,
)
def test_data_that_do_not_suffice_are_refused(problem, refused, flags, tmp_path):
    values, message = problem(tmp_path)
    values = {"data.cache_directory": tmp_path / "prepared", **values}
    code, said = refused(
        "train", *flags, *(f"--config.{name}={value}" for name, value in values.items()), f"--workdir={tmp_path}/run"
    )
    assert code == 3 and said.startswith(message), said
    assert not (tmp_path / "run").exists() and not list((tmp_path / "prepared").rglob(".*"))


def test_a_tokenizer_of_another_size_is_refused(refused, flags, trained, tmp_path):
    code, said = refused(
        "train",
        *flags,
        f"--config.tokenizer.path={trained}/tokenizer.model",
        "--config.tokenizer.vocab_size=500",
        f"--workdir={tmp_path}/run",
    )
    assert code == 3 and said == (
        f"tokenizer.vocab_size=500, but tokenizer.path={trained}/tokenizer.model has 400 ids (sentinels "
        "included); use tokenizer.vocab_size=400"
    )
    assert not (tmp_path / "run").exists()


def test_a_data_directory_that_can_not_be_written_is_refused(refused, flags, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, said = refused(
        "train", *flags, f"--config.data.cache_directory={tmp_path}/file/prepared", f"--workdir={tmp_path}/run"
    )
    assert code == 4 and said.startswith(
        f"data.cache_directory={tmp_path}/file/prepared can't be used: Not a directory"
    )
    assert contents(tmp_path) == {"file": b"in the way"}


# ---- Run directories ----


def test_a_file_in_the_way_of_the_run_directory_is_refused(refused, flags, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below" / "run"):
        code, said = refused("train", *flags, f"--workdir={workdir}")
        assert code == 4 and said.startswith(f"--workdir={workdir} can't be ") and "use another --workdir" in said
    assert contents(tmp_path) == {"file": b"in the way"}


def test_a_directory_of_somebody_else_is_refused(refused, flags, tmp_path):
    (tmp_path / "thesis.tex").write_text("dear")
    code, said = refused("train", *flags, f"--workdir={tmp_path}")
    assert code == 2 and said == f"--workdir={tmp_path} is not empty and holds no run; use another --workdir"
    assert contents(tmp_path) == {"thesis.tex": b"dear"}


def test_the_directory_of_another_run_is_refused_by_field_and_both_values(refused, flags, trained):
    before = contents(trained)
    code, said = refused(
        "train", *flags, f"--workdir={trained}", "--config.optimizer.learning_rate=0.5", "--config.train.num_steps=9"
    )
    assert (
        code == 2
        and said
        == f"--workdir={trained} holds another run: optimizer.learning_rate: 0.01 -> 0.5; use another --workdir"
    )
    assert contents(trained) == before


def test_public_tasks_without_their_package_say_how_to_get_it(refused, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):  # set for the process that asks
        monkeypatch.setenv(name, "1")
    monkeypatch.delitem(sys.modules, "t5like.evaluation.lm_eval", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    code, said = refused("evaluate", "--workdir=/proc/nowhere", "--tasks=lambada_openai")
    assert code == 2 and said.startswith("--tasks needs the package lm-eval")
    assert said.endswith("pip install 't5like[harness]'")


def test_a_damaged_config_of_a_run_is_refused(refused, flags, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("{")
    for arguments in (["train", *flags], ["evaluate"], ["generate", "--prompt=a"]):
        code, said = refused(*arguments, f"--workdir={tmp_path}/run")
        assert code == 4 and said.startswith(f"{tmp_path}/run/config.json can't be read: ")


def test_a_directory_without_a_run_can_not_be_evaluated(refused, tmp_path):
    for arguments in (["evaluate"], ["generate", "--prompt=a"]):
        for workdir in (tmp_path, tmp_path / "nowhere"):
            code, said = refused(*arguments, f"--workdir={workdir}")
            assert code == 4 and said == f"--workdir={workdir} holds no run; train first, or check the path"
    assert contents(tmp_path) == {}


def test_a_step_without_a_checkpoint_is_refused(refused, trained):
    for arguments in (["evaluate"], ["generate", "--prompt=a"]):
        code, said = refused(*arguments, f"--workdir={trained}", "--step=7")
        assert code == 4 and said == f"{trained}/checkpoints holds no complete checkpoint of step 7; there are 1, 2"


def test_a_damaged_checkpoint_is_refused_and_the_earlier_one_named(refused, command, flags, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    for path in (tmp_path / "run/checkpoints/2/state").rglob("d/*"):
        path.write_bytes(bytes(byte ^ (index % 4096 == 2000) for index, byte in enumerate(path.read_bytes())))
    before = contents(tmp_path)
    for arguments in (["evaluate"], ["generate", "--prompt=a"], ["train", *flags, "--config.train.num_steps=4"]):
        code, said = refused(*arguments, f"--workdir={tmp_path}/run")
        assert code == 4 and said.startswith(f"{tmp_path}/run/checkpoints/2"), said
    after = contents(tmp_path)
    assert {name for name in before if before[name] != after.get(name)} <= {
        "run/config.json"
    }  # which has the new num_steps
    assert command("evaluate", f"--workdir={tmp_path}/run", "--step=1")[0] == 0


def test_metrics_that_can_not_be_written_are_still_printed(command, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "evaluations").write_text("in the way")
    code, out, err = command("evaluate", f"--workdir={tmp_path}/run")
    assert (
        code == 4
        and json.loads(out)["step"] == 2
        and err.splitlines()[-1].startswith(f"t5like: {tmp_path}/run/evaluations/2.json can't be written")
    )
