"""`t5like generate` on a prompt, on files and on standard input, as a user runs it."""

import dataclasses
import io
import json
import os
import re
from pathlib import Path

import jax
import pytest
from conftest import contents, small

from t5like.checkpoint import run_directory
from t5like.cli import prompts
from t5like.config.schema import MeshConfig
from t5like.data import pipeline
from t5like.errors import CheckpointError, ConfigError, DataError
from t5like.inference.generate import Generator
from t5like.inference.sampling import DecodingOptions
from t5like.optim import train_state
from t5like.sharding import mesh as meshes


@pytest.fixture
def generate(command, trained):
    """Run the command: exit code, standard output, standard error."""
    return lambda *flags: command("generate", f"--workdir={trained}", "--max_new_tokens=8", *flags)


@pytest.fixture
def prompts_file(tmp_path):
    """A file of prompts of several lengths, with a field of their own."""
    path = tmp_path / "prompts.jsonl"
    texts = ["ba de <extra_id_0> go", "de", "ba de fi go hu ka le mi no pu ra se <extra_id_0> ti vo <extra_id_1>", ""]
    path.write_text("".join(json.dumps({"id": i, "prompt": text}) + "\n" for i, text in enumerate(texts)))
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_predictions_for_a_file_are_in_order_and_continue_after_an_interruption(generate, prompts_file, tmp_path):
    output = tmp_path / "out.jsonl"
    flags = [f"--prompts_file={prompts_file}", f"--output={output}"]
    code, said, err = generate(*flags)
    assert code == 0 and err == "prompt 4/4  left 0:00\n" and said == f"predictions  {output}: 4 rows\n"
    rows = rows_of(output)
    assert [row["id"] for row in rows] == [0, 1, 2, 3] and all(row["log_prob"] < 0 for row in rows)
    assert rows[0]["filled"].startswith("ba de") and "filled" not in rows[1]
    code, said, _ = generate("--prompt=de")  # alone as among others
    assert said == rows[1]["prediction"] + "\n"

    whole = output.read_bytes()
    output.write_bytes(whole[: whole.rindex(b'"id": 2') + 9])
    code, said, err = generate(*flags)
    assert code == 0 and said == f"predictions  {output}: 4 rows, 2 of them kept\n" and output.read_bytes() == whole

    code, _, err = generate(*flags, "--num_beams=2")
    assert code == 2 and err.startswith(f"t5like: --output={output} was started with num_beams=1, which is now 2; use")
    prompts_file.write_text(prompts_file.read_text().replace('"de"', '"fi"'))
    code, _, err = generate(*flags)
    assert code == 3 and err.startswith(f"t5like: --output={output}:2 has another prompt than")
    assert output.read_bytes() == whole

    output.unlink()  # begun anew, with other settings
    assert generate(*flags, "--seed=1")[0] == 0 and generate(*flags, "--seed=1")[0] == 0


@pytest.fixture
def two(tmp_path):
    """A file of two prompts."""
    path = tmp_path / "two.jsonl"
    path.write_text('{"prompt": "éde"}\n{"prompt": "go"}\n')
    return path


@pytest.fixture
def answer(trained, two, capsys):
    """Answer the two prompts into a file, in this process; what is printed."""
    loaded = run_directory.load(trained)
    generator = Generator(loaded.config, loaded.params, loaded.tokenizer)

    def answer(output, seed=0, step=2):
        prompts.generate_file(
            generator, DecodingOptions(8, seed=seed), two, prompts.read_prompts(two), output, {"step": step}
        )
        return capsys.readouterr().out

    return answer


def test_lines_of_an_output_never_change(answer, tmp_path):
    output = tmp_path / "out.jsonl"
    answer(output)
    whole = output.read_bytes()
    first, second = whole.splitlines(keepends=True)
    middle = first.index(b"\xc3") + 1  # of a character
    for begun, kept in ((whole[:-1], 2), (first[:-1], 1), (first + second[:-9], 1), (first[:middle], 0), (b"", 0)):
        output.write_bytes(begun)
        out = answer(output)
        assert output.read_bytes() == whole, begun
        assert out == f"predictions  {output}: 2 rows" + f", {kept} of them kept" * (kept > 0) + "\n"


def test_a_last_line_without_end_that_this_command_has_not_begun_is_refused_and_unchanged(answer, tmp_path):
    output = tmp_path / "out.jsonl"
    answer(output)
    first, second = output.read_bytes().splitlines(keepends=True)
    for begun in (first + second[:20] + b'", "mine": 1', b'{"prompt": "\xc3\xa9de", "prediction": "my own words'):
        output.write_bytes(begun)
        with pytest.raises(
            DataError, match=r"out\.jsonl:[12] has no end, and is not the beginning of the row"
        ) as error:
            answer(output)
        assert "\n" not in str(error.value) and output.read_bytes() == begun


def test_an_output_of_another_command_is_refused_and_unchanged(answer, two, tmp_path):
    directory = tmp_path / "outputs"
    directory.mkdir()
    output, beside = directory / "out.jsonl", directory / "out.jsonl.settings.json"
    answer(output)
    whole, settings = output.read_bytes(), beside.read_bytes()
    first = whole.splitlines(keepends=True)[0]

    def refused(error, complaint, output=output, **settings):
        before = contents(tmp_path)
        with pytest.raises(error, match=re.escape(complaint)):
            answer(output, **settings)
        assert contents(tmp_path) == before

    for content in (whole + b"notes", whole + b"{}", first + b"notes", b"notes", b"\n", first * 2):
        output.write_bytes(content)
        refused(DataError, f"--output={output}:")
    output.write_bytes(first)
    refused(ConfigError, "was started with seed=0, which is now 7", seed=7)
    refused(ConfigError, "was started with step=2, which is now 1", step=1)
    beside.write_text("notes")
    refused(DataError, f"{beside} is not a file of settings from t5like; remove it")
    beside.unlink()
    refused(DataError, "has predictions, but out.jsonl.settings.json with their settings does not exist")
    output.unlink()
    beside.write_text("notes")  # of somebody else
    refused(DataError, f"{beside} is not a file of settings from t5like; remove it")
    beside.write_bytes(settings)
    output.symlink_to(two)
    (directory / "also.jsonl.settings.json").hardlink_to(two)
    os.mkfifo(directory / "pipe")
    for path, error, complaint in (
        (two, ConfigError, f"would write into --prompts_file={two}; use another --output"),
        (output, ConfigError, f"would write into --prompts_file={two}; use another --output"),
        (directory / "also.jsonl", ConfigError, f"would write into --prompts_file={two}; use another --output"),
        (directory, CheckpointError, f"--output={directory} is not a regular file; use another --output"),
        ("/", CheckpointError, "--output=/ is not a regular file; use another --output"),
        ("/dev/null", CheckpointError, "--output=/dev/null is not a regular file; use another --output"),
        (directory / "pipe", CheckpointError, "pipe is not a regular file; use another --output"),
        (
            directory / "none" / "out",
            CheckpointError,
            "can't be written: No such file or directory; use another --output",
        ),
        (directory / ("o" * 300), CheckpointError, "can't be written: File name too long; use another --output"),
        (two / "out", CheckpointError, "can't be written: Not a directory; use another --output"),
    ):
        refused(error, complaint, Path(path))


def test_beams_are_sorted_and_samples_are_reproducible(generate, prompts_file, tmp_path):
    code, out, _ = generate(f"--prompts_file={prompts_file}", "--num_beams=3", "--num_returned=3", "--length_penalty=0")
    assert code == 0
    for line in out.splitlines():
        row = json.loads(line)
        nats = [answer["log_prob"] for answer in row["predictions"]]
        assert nats == sorted(nats, reverse=True) and nats[0] == row["log_prob"]
        assert len({answer["prediction"] for answer in row["predictions"]}) > 1
    flags = ["--prompt=ba de", "--temperature=1.5", "--top_k=50", "--top_p=0.9", "--min_p=0.001", "--num_returned=3"]
    code, first, err = generate(*flags, "--repetition_penalty=1.2")
    assert code == 0, err
    assert len(set(first.splitlines())) == 3 and generate(*flags, "--repetition_penalty=1.2")[1] == first


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a"}\n{"prompt"\n', "prompts.jsonl:2: not valid JSON"),
        ('{"prompt": "a"}\n\n{"text": "a"}\n', 'prompts.jsonl:3 must have a text in "prompt"'),
        ('{"prompt": "a", "prediction": "b"}\n', 'prompts.jsonl:1 already has a "prediction"'),
        ('{"prompt": "a", "score": NaN}\n', "prompts.jsonl:1: not valid JSON (NaN is no JSON number); every line"),
        ('{"prompt": "<extra_id_99>"}\n', "prompt 1: <extra_id_99> is not one of the tokenizer's 20 sentinels"),
        ("", "has no prompts"),
        (None, "can't be read: No such file"),
    ],
)
def test_a_wrong_file_of_prompts_is_refused_with_its_line_number(text, said, generate, tmp_path):
    path, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    if text is not None:
        path.write_text(text)
    code, out, err = generate(f"--prompts_file={path}", f"--output={output}")
    assert code == 3 and said in err and err.startswith(f"t5like: --prompts_file={path}") and err.count("\n") == 1
    assert out == "" and not output.exists()


def test_each_line_of_standard_input_gets_a_prediction(generate, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("ba <extra_id_0> de\nde\n"))
    code, out, err = generate()
    assert code == 0 and err == "" and out.startswith("ba ") and out.splitlines()[0].endswith(" de")
    assert out == "".join(generate(f"--prompt={prompt}")[1] for prompt in ("ba <extra_id_0> de", "de"))
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    said = "t5like: standard input has no prompts; write one in each line, or use --prompt=TEXT\n"
    assert generate() == (3, "", said)


def test_a_prediction_ends_before_a_stop_text(generate):
    whole = generate("--prompt=de")[1].rstrip("\n")
    stop = whole[len(whole) // 2 :][:3]
    assert generate("--prompt=de", f"--stop={stop}")[1] == whole[: whole.index(stop)] + "\n"


def test_every_mesh_gives_the_predictions_of_one_device(trained):
    loaded = run_directory.load(trained)
    texts = ["ba de <extra_id_0> go", "de", "ba de fi go hu ka le mi no pu ra se", "go", "ka le"]
    wanted = None
    for sizes in (None, {"data": 8, "fsdp": 1}, {"data": 2, "fsdp": 2, "tensor": 2}):
        config, mesh, params = loaded.config, loaded.mesh, loaded.params
        if sizes:
            config = dataclasses.replace(config, mesh=MeshConfig(**sizes))
            mesh = meshes.make_mesh(config)
            shape = train_state.abstract_state(config, pipeline.spec(config), mesh).params
            params = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, shape))
        generator = Generator(config, params, loaded.tokenizer)
        given = [generator.prompt(text) for text in texts]
        with jax.set_mesh(mesh):
            answers = [a for beams in generator.answer(given, DecodingOptions(8, num_beams=3)) for a in beams]
        wanted = wanted or answers
        assert [answer.ids for answer in answers] == [answer.ids for answer in wanted]
        assert [answer.log_prob for answer in answers] == pytest.approx(
            [answer.log_prob for answer in wanted], rel=1e-4
        )


def test_a_mesh_that_does_not_fit_is_replaced_by_one_of_all_devices():
    config = small(mesh={"data": 3, "fsdp": 1}, data={"batch_size": 6})
    assert run_directory.on_devices(config, 3).mesh == config.mesh
    assert run_directory.on_devices(config, 8, slices=4).mesh == MeshConfig(
        data=4, fsdp=2, slices=4
    )  # a TPU's is no choice
    assert meshes.axis_sizes(run_directory.on_devices(config, 5), 5) == {
        "data": 5,
        "fsdp": 1,
        "tensor": 1,
        "context": 1,
    }
