"""Labelled examples: from records to labels, to numbers in a token store, to rows."""

import json

import numpy as np
import pytest
from conftest import small

from t5like.config.schema import DataConfig
from t5like.data.pipeline import Batches, open_split, spec
from t5like.data.sources.files import Record
from t5like.data.sources.label_tasks import complexity, name_labels
from t5like.data.sources.labels import Labelled, example_format
from t5like.data.store import preparation
from t5like.data.store.label_numbers import encode_words
from t5like.data.tokenizers.vocabulary import Vocabulary
from t5like.errors import ConfigError, DataError

TEXTS = ["one word", "alpha", "a longer text of eight words, or nine"] * 20


def examples(count: int = 60) -> list[dict]:
    return [
        {
            "inputs": f"{text} {number}",
            "other": "second one",
            "label": ["yes", "no"][number % 2],
            "value": number / 3 - 5,
            "tags": [["yes", "no"][place % 2] for place in range(len(text.split()) + 1)],
        }
        for number, text in enumerate(TEXTS[:count])
    ]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Open the training rows of the examples: (config, tokenizer, records by text, batches)."""
    place = tmp_path_factory.mktemp("labelled")
    (place / "e.jsonl").write_text("".join(json.dumps(each) + "\n" for each in examples()))

    def open_them(objective: str, **data):
        target = {"classification": "label", "regression": "value", "token_classification": "tags"}[objective]
        data = {"labels": () if target == "value" else ("yes", "no"), "inputs_length": 40, "batch_size": 4, **data}
        config = small(
            tokenizer={"vocab_size": 302, "num_sentinels": 10},
            model={"architecture": "encoder", "token_types": 2},
            data={
                "source": f"jsonl:{place}/e.jsonl", "objective": objective, "targets_template": f"{{{target}}}",
                "heldout_fraction": 0.1, "cache_directory": str(place / "cache"), **data,
            },
        )  # fmt: skip
        prepared = preparation.prepare(config, progress=False)
        split = open_split(config, prepared.stores, "train")
        batches = Batches(config, Vocabulary.of(prepared.tokenizer), split)
        return config, prepared.tokenizer, {each["inputs"]: each for each in examples()}, batches

    return open_them


def segments(batch):
    """(ids, types, targets, weights) of each example of a batch, padding left out."""
    for row in range(len(batch.encoder_BS)):
        for segment in range(1, batch.encoder_segments_BS[row].max() + 1):
            place = batch.encoder_segments_BS[row] == segment
            assert batch.encoder_positions_BS[row][place].tolist() == list(range(place.sum()))
            types = None if batch.token_types_BS is None else batch.token_types_BS[row][place]
            yield (
                batch.encoder_BS[row][place].tolist(),
                types,
                batch.targets_BL[row][place],
                batch.weights_BL[row][place],
            )


@pytest.mark.parametrize("objective, packing", [("classification", True), ("regression", True), ("regression", False)])
def test_the_label_of_a_text_stands_at_its_cls(objective, packing, opened):
    config, tokenizer, records, batches = opened(objective, packing=packing)
    batch, seen = batches.at(0), 0
    assert [x.dtype for x in batch if x is not None] == [x.dtype for x in spec(config) if x is not None]
    for ids, _, targets, weights in segments(batch):
        assert ids[0] == tokenizer.sentinel_ids[1] and ids[-1] == tokenizer.eos_id
        record = records[tokenizer.decode(ids[1:])]
        right = ("yes", "no").index(record["label"]) if objective == "classification" else np.float32(record["value"])
        assert targets[0] == right and weights.tolist() == [1] + [0] * (len(ids) - 1)
        seen += 1
    assert batch.weights_BL.sum() == seen and (seen > 4 if packing else seen == 4)


def test_the_label_of_a_word_stands_at_its_first_token(opened):
    _, tokenizer, records, batches = opened("token_classification")
    for ids, _, targets, weights in segments(batches.at(0)):
        text = tokenizer.decode(ids[1:])
        words = text.split()
        begins = [1 + len(tokenizer.encode(" ".join(words[:number]))) for number in range(len(words))]  # behind [CLS]
        assert np.flatnonzero(weights).tolist() == begins
        assert [("yes", "no")[label] for label in targets[begins]] == records[text]["tags"]


def test_the_second_text_of_a_pair_has_the_other_token_type(opened):
    _, tokenizer, _, batches = opened("classification", second_template="{other}", packing=True)
    for ids, types, _, _ in segments(batches.at(0)):
        cut = ids.index(tokenizer.eos_id) + 1
        assert tokenizer.decode(ids[cut:]) == "second one" and ids[-1] == tokenizer.eos_id
        assert types.tolist() == [0] * cut + [1] * (len(ids) - cut)


def test_words_are_tokenized_as_in_their_text(opened):
    _, tokenizer, _, _ = opened("classification")
    words = ["a", "longer", "text,", "of", "words"]
    ids, numbers = encode_words(tokenizer, words)
    assert ids.tolist() == tokenizer.encode(" ".join(words)) and numbers.max() == 5
    assert encode_words(tokenizer, [])[0].tolist() == []


def test_a_label_of_a_word_may_be_true_or_false_as_that_of_a_text():
    record = Record({"inputs": [True, "word"], "label": [True, False]}, "line 3")
    settings = DataConfig(objective=("token_classification",), targets_template="{label}", labels=("true", "false"))
    assert [part.text for part in Labelled(settings).parts(record)] == ["true word", "0 1"]


@pytest.mark.parametrize(
    "objective, target, fields, message",
    [
        ("classification", "{label}", {"label": "maybe"}, "'maybe' is not one of data.labels=yes,no"),
        ("classification", "{label}", {"label": "1" * 5000}, "is not one of data.labels=yes,no, nor the index of one"),
        ("classification", "{label}", {"label": 2}, "'2' is not one of data.labels=yes,no, nor the index of one"),
        ("regression", "{label}", {"label": "nan"}, "'nan' must be a finite number"),
        ("token_classification", "{label}", {"label": ["yes"]}, "2 words have 1 labels"),
        ("token_classification", "{label}", {"label": {"a": 1}}, "'label' must be a list of words"),
        ("token_classification", "{label}", {"label": ["yes", "a b"]}, "words must not have white space"),
    ],
)
def test_a_label_that_is_none_is_refused(objective, target, fields, message):
    labels = () if objective == "regression" else ("yes", "no")
    made = example_format(DataConfig(objective=(objective,), targets_template=target, labels=labels))
    assert isinstance(made, Labelled)
    with pytest.raises(DataError, match=f"line 3: .*{message}"):
        made.parts(Record({"inputs": "two words", **fields}, "line 3"))
    with pytest.raises(ConfigError, match=r"data.targets_template must be one field .*; use \{label\}"):
        Labelled(DataConfig(objective=("token_classification",), targets_template="x {label}", labels=("a", "b")))


def test_names_and_indices_of_labels_mean_the_same():
    made = Labelled(DataConfig(objective=("classification",), targets_template="{label}", labels=("yes", "no")))
    parts = [made.parts(Record({"inputs": "x", "label": label}, "")) for label in ("no", 1, "1", " no ")]
    assert {part[1].text for part in parts} == {"1"} and made.parts(Record({"inputs": "x", "label": ""}, "")) == ()


def test_the_offline_tasks_have_the_labels_of_the_syntax_tree():
    code = "for a in b:\n    if a and c or d:\n        x = [y for y in a if y]\n    elif e: pass"
    assert complexity(code) == 1 + 1 + 1 + 2 + 1 + 1  # loop, if, and + or, comprehension, elif
    assert complexity("return 1") == 1
    words, labels = name_labels("os.path.join(name.x, sep=1)[0].a")
    assert words == [
        "os",
        ".",
        "path",
        ".",
        "join",
        "(",
        "name",
        ".",
        "x",
        ",",
        "sep",
        "=",
        "1",
        ")",
        "[",
        "0",
        "]",
        ".",
        "a",
    ]
    assert labels == [
        "B-CALL", "I-CALL", "I-CALL", "I-CALL", "I-CALL", "O", "B-VALUE", "I-VALUE", "I-VALUE", "O", "B-KEYWORD", "O",
        "B-LITERAL", "O", "O", "B-LITERAL", "O", "O", "O",
    ]  # fmt: skip
