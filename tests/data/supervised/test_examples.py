"""Stores of supervised examples, and their units for packing, compared with the records."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import contents, small

from t5like.config.schema import TokenizerConfig
from t5like.data.store.preparation import Prepared, prepare
from t5like.data.supervised.examples import Examples
from t5like.data.tokenizers.tokenizer import train_tokenizer
from t5like.errors import ConfigError, DataError

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]


def sentence(rng, most=9):
    return " ".join(rng.choice(WORDS, rng.integers(1, most)))


def questions(count, seed=0):
    """Records with an `inputs` and a `targets`; every fifth repeats the inputs of the one before."""
    rng = np.random.default_rng(seed)
    numbers = [i - (i % 5 == 4) for i in range(count)]
    texts = {i: f"{i} {sentence(rng)}" for i in numbers}
    return [{"inputs": texts[i], "targets": sentence(rng, 4)} for i in numbers]


def conversations(count, seed=0):
    rng = np.random.default_rng(seed)
    turns = lambda i: [
        {"role": role, "content": f"{i} {sentence(rng, 4)}"}
        for _ in range(rng.integers(1, 4))
        for role in ("user", "assistant")
    ]
    extra = lambda i: [{"role": "user", "content": "bye"}] if i % 2 else []
    return [{"talk": [{"role": "system", "content": "be"}, *turns(i), *extra(i)]} for i in range(count)]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    rng = np.random.default_rng(0)
    train_tokenizer(
        [f"user: {i} {sentence(rng)}" for i in range(500)], TokenizerConfig(vocab_size=320, num_sentinels=20), path
    )
    return path


@pytest.fixture
def own(tmp_path, model):
    """A function from changes to a config on the test's own a.jsonl."""

    def make(architecture="encoder_decoder", **data):
        base = {
            "objective": "supervised",
            "source": f"jsonl:{tmp_path}/a.jsonl",
            "cache_directory": str(tmp_path / "prepared"),
            "heldout_fraction": 0.1,
            "num_workers": 1,
            "inputs_length": 200,
            "targets_length": 100,
        }
        tokenizer = {"path": str(model), "vocab_size": 320, "num_sentinels": 20}
        return small(tokenizer=tokenizer, data={**base, **data}, model={"architecture": architecture})

    return make


def ready(config) -> Prepared:
    return prepare(config, progress=False)


def units(config, prepared: Prepared, split: str) -> list[tuple[str, str]]:
    """The inputs and targets of each unit of a split, as text; every part ends in a bar."""
    examples = Examples(config, config.data.source[0], prepared.stores[0], split)
    one = lambda begin, end: prepared.tokenizer.decode(
        examples.stream.gather(np.array([begin]), np.array([end - begin])), keep_special=True
    ).replace("</s>", "|")
    return [
        (one(begin, cut), one(cut, end))
        for begin, cut, end in zip(examples.begin_N, examples.cut_N, examples.end_N, strict=True)
    ]


# ---- What is in a store ----


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder"])
def test_every_example_is_in_one_split_with_its_inputs_and_targets(own, tmp_path, architecture):
    rows = questions(6000)
    write(tmp_path / "a.jsonl", rows)
    config = own(architecture)
    prepared = ready(config)
    assert len(prepared.stores[0].manifest["pieces"]) > 1
    train, heldout = (units(config, prepared, split) for split in ("train", "heldout"))
    assert sorted(train + heldout) == sorted((row["inputs"] + "|", row["targets"] + "|") for row in rows)
    assert not {inputs for inputs, _ in train} & {inputs for inputs, _ in heldout}  # though every fifth is a repetition
    assert 450 < len(heldout) < 750


def test_one_store_serves_both_architectures(own, tmp_path):
    write(tmp_path / "a.jsonl", questions(50))
    assert ready(own()).stores[0].directory == ready(own("decoder")).stores[0].directory
    assert ready(own()).stores[0].directory != ready(own(inputs_template="x {inputs}")).stores[0].directory


def test_a_conversation_gives_an_encoder_decoder_a_unit_per_assistant_turn(own, tmp_path):
    rows = conversations(60)
    write(tmp_path / "a.jsonl", rows)
    config = own(messages_field="talk")
    prepared = ready(config)
    expected = []
    for row in rows:
        read = ""
        for message in row["talk"]:
            if message["role"] == "assistant":
                expected.append((read, message["content"] + "|"))
            read += (
                message["content"] if message["role"] == "assistant" else f"{message['role']}: {message['content']}"
            ) + "|"
    assert sorted(units(config, prepared, "train") + units(config, prepared, "heldout")) == sorted(expected)


def test_a_conversation_gives_a_decoder_one_unit_up_to_the_last_assistant_turn(own, tmp_path):
    rows = conversations(60)
    write(tmp_path / "a.jsonl", rows)
    config = own("decoder", messages_field="talk")
    prepared = ready(config)
    texts = []
    for row in rows:
        talk = row["talk"][: -1 if row["talk"][-1]["role"] == "user" else None]
        texts.append(
            "".join((m["content"] if m["role"] == "assistant" else f"{m['role']}: {m['content']}") + "|" for m in talk)
        )
    assert sorted(units(config, prepared, "train") + units(config, prepared, "heldout")) == sorted(
        ("", text) for text in texts
    )


def test_a_tokenizer_is_trained_on_inputs_and_targets_of_training_examples(own, tmp_path):
    write(
        tmp_path / "a.jsonl",
        [{"inputs": f"{i} " + "q" * (i % 9), "targets": "żółw " * (i % 7 + 1)} for i in range(900)],
    )
    config = own()
    trained = small(tokenizer={"vocab_size": 310, "num_sentinels": 20}, data={**vars(config.data)})
    prepared = ready(trained)
    assert (
        len(prepared.tokenizer.encode("żółw")) < 5 and len(prepared.tokenizer.encode("qqqq")) < 4
    )  # not spelled in bytes


# ---- Interruptions and changes ----


def test_workers_and_an_interrupted_store_give_the_result_of_one_process(own, tmp_path):
    write(tmp_path / "a.jsonl", questions(8000))
    alone = ready(own()).stores[0].directory
    whole = contents(alone)
    assert len(whole) > 10
    (alone / "manifest.json").unlink()
    (alone / "pieces" / "00001.json").unlink()
    (alone / "pieces" / "00000.train.targets").write_bytes(b"half of it")
    assert contents(ready(own()).stores[0].directory) == whole
    shutil.rmtree(alone)
    assert contents(ready(own(num_workers=2)).stores[0].directory) == whole


def test_a_changed_source_is_refused(own, tmp_path):
    write(tmp_path / "a.jsonl", questions(50))
    ready(own())
    write(tmp_path / "a.jsonl", questions(51))
    with pytest.raises(
        DataError, match="has changed since [0-9]+ tokens were prepared from it; restore the old data, or remove"
    ):
        ready(own())


# ---- Refusals ----


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"inputs_template": "{question}"},
            "a.jsonl:1: there is no field 'question'; name in .* one of 'inputs', 'targets'",
        ),
        (
            {"messages_field": "talk"},
            "a.jsonl:1: there is no field 'talk'; set data.messages_field to one of 'inputs', 'targets'",
        ),
        ({"messages_field": "inputs"}, "a.jsonl:1: 'inputs' is a str, but must be a list"),
    ],
)
def test_a_wrong_field_is_refused_before_anything_is_written(own, tmp_path, data, message):
    write(tmp_path / "a.jsonl", questions(50))
    with pytest.raises(DataError, match=message):
        ready(own(**data))
    assert not (tmp_path / "prepared").exists()


def test_a_wrong_template_and_a_source_without_fields_are_refused(own, tmp_path):
    write(tmp_path / "a.jsonl", questions(50))
    with pytest.raises(ConfigError, match="data.targets_template='yes' must name a field"):
        ready(own(targets_template="yes"))
    with pytest.raises(ConfigError, match="has no fields, which data.objective=supervised needs"):
        ready(own(source=f"text:{tmp_path}/a.jsonl"))


def test_examples_with_empty_targets_are_left_out_and_counted(own, tmp_path):
    rows = questions(60)
    for row in rows[3:13]:
        row["targets"] = ""
    write(tmp_path / "a.jsonl", rows)
    for _ in range(2):  # prepared, and loaded
        prepared = ready(own())
        assert prepared.notes == (
            f"data.source=jsonl:{tmp_path}/a.jsonl: 10 examples have empty targets and are left out",
        )
    pairs = units(own(), prepared, "train") + units(own(), prepared, "heldout")
    assert sorted(pairs) == sorted((row["inputs"] + "|", row["targets"] + "|") for row in rows if row["targets"])
    write(tmp_path / "a.jsonl", [{**row, "targets": ""} for row in rows])
    with pytest.raises(DataError, match="has 0 different inputs with targets, and one has to be held out"):
        ready(own(cache_directory=str(tmp_path / "other")))


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder"])
def test_examples_that_do_not_fit_in_a_row_are_left_out_and_counted(own, tmp_path, architecture):
    write(tmp_path / "a.jsonl", questions(300))
    whole = own(architecture)
    prepared = ready(whole)
    open_train = lambda config: Examples(config, "jsonl:a", prepared.stores[0], "train")
    everything = open_train(whole)
    assert everything.too_long == 0 and everything.note == ""
    inputs, targets = (everything.cut_N - everything.begin_N), (everything.end_N - everything.cut_N)
    config = own(architecture, inputs_length=12, targets_length=5)
    fits = (inputs + targets <= 17) if architecture == "decoder" else (inputs <= 12) & (targets <= 5)
    examples = open_train(config)
    assert 0 < len(examples) == fits.sum() and examples.too_long == (~fits).sum() > 0
    np.testing.assert_array_equal(examples.begin_N, everything.begin_N[fits])
    np.testing.assert_array_equal(examples.targets_M2[examples.first_N], np.stack([examples.cut_N, examples.end_N], 1))
    note = f"data.source=jsonl:a: {(~fits).sum()} of {len(fits)} training examples are longer than data.inputs_length"
    assert (
        examples.note.startswith(note)
        and f"{max(inputs + targets) if architecture == 'decoder' else max(inputs)}" in examples.note
    )
    with pytest.raises(
        DataError, match=f"all {len(fits)} training examples are longer than data.inputs_length.*; use"
    ) as refused:
        open_train(own(architecture, inputs_length=1, targets_length=1))
    values = dict(part.split("=") for part in str(refused.value).partition("; use ")[2].split(" and "))
    fixed = {name.removeprefix("data."): int(value) for name, value in values.items()}
    assert open_train(own(architecture, **{"targets_length": 1, **fixed})).too_long == 0  # what it says works
