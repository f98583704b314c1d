"""A config or data that can't be used are refused in one line, before the run directory exists."""

import gzip
from pathlib import Path

import pytest
from conftest import contents, write_text

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
def test_missing_or_insufficient_data_are_refused(problem, refused, flags, tmp_path):
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
