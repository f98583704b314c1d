"""Which fields may change when a run continues; and the history that a checkpoint's metadata contain."""

import dataclasses

import pytest

from t5like.checkpoint import allowed_changes, metadata
from t5like.checkpoint.allowed_changes import CHANGEABLE_FIELDS, MUTABLE_FIELDS, forbidden_differences
from t5like.config.schema import Config, flatten
from t5like.data.row_schedule import RowSchedule
from t5like.errors import CheckpointError, ConfigError


def changed(name, value):
    section, field = name.split(".")
    return dataclasses.replace(Config(), **{section: dataclasses.replace(getattr(Config(), section), **{field: value})})


def test_every_field_is_free_needs_the_flag_or_never_changes():
    names = flatten(Config())
    assert set(CHANGEABLE_FIELDS) < set(names) and not any(
        name.startswith(MUTABLE_FIELDS) for name in CHANGEABLE_FIELDS
    )
    never = [name for name in names if not name.startswith((*MUTABLE_FIELDS, *CHANGEABLE_FIELDS))]
    assert {"seed", "data.source", "tokenizer.vocab_size", "model.num_layers", "optimizer.name"} < set(never)


@pytest.mark.parametrize(
    "name, value, free, allowed",
    [
        ("train.num_steps", 7, True, True),
        ("optimizer.learning_rate", 0.5, False, True),
        ("data.batch_size", 64, False, True),
        ("model.num_layers", 3, False, False),
        ("data.source", ("text:x",), False, False),
    ],
)
def test_a_difference_is_free_allowed_by_the_flag_or_refused(name, value, free, allowed):
    new = changed(name, value)
    assert (forbidden_differences(Config(), new) == []) == free
    differs = forbidden_differences(Config(), new, allowed=(name, "data"))
    assert (differs == []) == allowed
    assert allowed or differs[0].startswith(f"{name}: ")


def test_imported_weights_take_other_initial_values_unless_they_scale_the_logits():
    def differences(tied: bool) -> list[str]:
        old = changed("model.tied_embeddings", tied)
        new = dataclasses.replace(old, model=dataclasses.replace(old.model, init="gpt2"))
        assert forbidden_differences(old, new) == ["model.init: 't5' -> 'gpt2'"]
        return forbidden_differences(old, new, imported=True)

    assert differences(tied=False) == [] and differences(tied=True) == ["model.init: 't5' -> 'gpt2'"]


def test_the_flag_takes_several_fields_and_refuses_others():
    fields = allowed_changes.parse(["optimizer.learning_rate,data.batch_size", "data", "train.num_steps"])
    assert fields == ("optimizer.learning_rate", "data.batch_size", "data", "train.num_steps")
    for wrong in ("model.num_layers", "optimizer", "", "data.source"):
        with pytest.raises(ConfigError, match=f"--allow_change={wrong} must be a field that may change"):
            allowed_changes.parse([wrong])


def test_the_message_names_the_flag_only_if_it_helps():
    both = allowed_changes.remedy(["data.batch_size: 1 -> 2", "train.z_loss: 0 -> 1"])
    assert "add --allow_change=data.batch_size,train.z_loss to change it from here on" in both
    assert "--allow_change" not in allowed_changes.remedy(["data.batch_size: 1 -> 2", "seed: 0 -> 1"])


HISTORY = metadata.History(RowSchedule.of(128).passing_over(10, 13), 1, 2, {"text:a": "3 documents"})


def written(history):
    return metadata.to_dict(metadata.Meta(20, "", Config(), b"", "", {}, {}, history))


def test_a_history_is_read_as_it_was_written_and_only_one_that_matters_changes_the_format():
    plain = metadata.first_history(Config())._replace(data={"text:a": "3 documents"})
    for history, version in ((HISTORY, 2), (plain, 1)):
        values = written(history)
        assert values["format"] == version and metadata.from_dict(values).history == history
    del (older := written(plain))["body"]["data"]
    older["sha256"] = metadata._sha256(older["body"])
    assert metadata.from_dict(older).history == metadata.first_history(Config())


@pytest.mark.parametrize(
    "field, value", [("rows", []), ("rows", [[0, 0]]), ("rewinds", -1), ("bad_steps", "2"), ("rows", [[5, 0, 8]])]
)
def test_a_damaged_history_is_refused(field, value):
    values = written(HISTORY)
    values["body"]["history"][field] = value
    values["sha256"] = metadata._sha256(values["body"])
    with pytest.raises(CheckpointError, match="its field 'history' is missing or not valid"):
        metadata.from_dict(values)
