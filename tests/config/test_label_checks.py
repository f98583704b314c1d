"""Fields of objectives that predict labels: what is refused, in one line with a value that works."""

import pytest

from t5like.config import loader
from t5like.errors import ConfigError

ENCODER = {"model": {"architecture": "encoder"}}
CLASSES = {"objective": "classification", "labels": ["a", "b"]}
WORDS = {**CLASSES, "objective": "token_classification"}


@pytest.mark.parametrize(
    "values, field, rule",
    [
        ({"data": {"labels": ["a", "b"]}}, "data.labels", "needs data.objective=classification or token"),
        ({"data": {"second_template": "{x}"}}, "data.second_template", "needs data.objective=classification"),
        ({"model": {"pooling": "mean"}}, "model.pooling", "needs data.objective=classification or regression; use"),
        ({"evaluate": {"metrics": ["matthews"]}}, "evaluate.metrics", "are scores of labels, for data.objective=class"),
        ({"data": CLASSES}, "data.objective", "needs model.architecture=encoder, not encoder_decoder"),
        ({"data": {**CLASSES, "labels": ["a"]}}, "data.labels", "must be at least two different names"),
        (
            {"data": {**CLASSES, "labels": ["a", "b\u3000c"]}},
            "data.labels",
            "must be names without white space; use",
        ),
        (
            {"data": {**CLASSES, "objective": "regression"}},
            "data.labels",
            "must be empty for data.objective=reg",
        ),
        (
            {"data": {**CLASSES, "objective": ["classification", "mlm"]}},
            "data.objective",
            "can't combine class",
        ),
        ({"data": {**CLASSES, "messages_field": "m"}}, "data.messages_field", "needs data.objective=supervised"),
        ({"data": {**WORDS, "second_template": "{x}"}}, "data.second_template", "not token_classification"),
        ({"data": CLASSES, "evaluate": {"metrics": ["pearson"]}}, "evaluate.metrics", "must be of accuracy, macro_f1"),
        ({"data": WORDS, "evaluate": {"metrics": ["entity_f1"]}}, "data.labels", "must be O, B-NAME or I-NAME for"),
        ({"data": CLASSES, "evaluate": {"samples": True}}, "evaluate.samples", "needs generated text"),
        ({"data": CLASSES, "train": {"loss_chunk": 8}}, "train.loss_chunk", "must be 0 for data.objective=class"),
        ({"data": CLASSES, "tokenizer": {"num_sentinels": 1}}, "tokenizer.num_sentinels", "must be at least 2 for"),
        ({"data": {"objective": "regression"}, "distill": {"teacher": "runs/t"}}, "distill.teacher", "regression"),
        ({"data": CLASSES, "rl": {"method": "policy"}}, "data.objective", "must be supervised with rl.method=policy"),
    ],
)
def test_what_labels_do_not_go_with_is_refused(values, field, rule):
    alone = "objective" not in values.get("data", {}) or rule.startswith("needs model.architecture")
    with pytest.raises(ConfigError) as error:
        loader.resolve(values if alone else {**ENCODER, **values})
    message = str(error.value)
    assert message.startswith(f"{field}=") and rule in message and "\n" not in message
