"""Checks of the objectives that predict labels: classification, regression, token_classification.

Called by `checks`.
"""

from typing import get_args

from t5like.config.model_checks import require
from t5like.config.model_schema import ModelConfig
from t5like.config.schema import Config, DataConfig, EvaluateConfig, LabelMetric, Metric

METRICS = {  # of each objective
    "classification": ("accuracy", "macro_f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "token_classification": ("accuracy", "macro_f1", "matthews", "entity_f1"),
}


def check_labels(config: Config) -> None:
    """Refuse fields of labels without such an objective, and what such an objective can't use; see `checks.check`."""
    objective, data = config.data.label_objective, config.data
    defaults, only_labels = DataConfig(), set(get_args(LabelMetric)) - set(get_args(Metric))
    if objective is None:
        for field in ("labels", "second_template"):
            unset = getattr(data, field) == getattr(defaults, field)
            require(config, unset, f"data.{field}", f"needs data.objective={_use(field)}")
        require(
            config,
            config.model.pooling == ModelConfig.pooling,
            "model.pooling",
            "needs data.objective=classification or regression; use first",
        )
        require(
            config,
            not only_labels & set(config.evaluate.metrics),
            "evaluate.metrics",
            "are scores of labels, for data.objective=classification, regression or token_classification; use f1",
        )
        return
    _data(config, objective)
    require(
        config,
        set(config.evaluate.metrics) <= set(METRICS[objective]),
        "evaluate.metrics",
        f"must be of {', '.join(METRICS[objective])} for data.objective={objective}; use {METRICS[objective][0]}",
    )
    for field in ("answer_choices", "samples"):
        require(
            config,
            getattr(config.evaluate, field) == getattr(EvaluateConfig, field),
            f"evaluate.{field}",
            f"needs generated text, and data.objective={objective} predicts labels; leave it out",
        )
    require(
        config,
        "entity_f1" not in config.evaluate.metrics
        or all(label == "O" or label[:2] in ("B-", "I-") for label in data.labels),
        "data.labels",
        "must be O, B-NAME or I-NAME for the metric entity_f1; use O,B-PER,I-PER",
    )
    require(
        config,
        not config.distill.teacher or objective != "regression",
        "distill.teacher",
        "compares probabilities, which data.objective=regression does not predict; leave it out",
    )
    require(config, not config.train.loss_chunk, "train.loss_chunk", f"must be 0 for data.objective={objective}; use 0")


def _data(config: Config, objective: str) -> None:
    data = config.data
    if objective == "regression":
        require(config, not data.labels, "data.labels", "must be empty for data.objective=regression, which has none")
    else:
        require(
            config,
            len(set(data.labels)) == len(data.labels) > 1 and all(data.labels),
            "data.labels",
            f"must be at least two different names for data.objective={objective}; use negative,positive",
        )
        require(
            config,
            all(label.split() == [label] for label in data.labels),
            "data.labels",
            "must be names without white space; use negative,positive",
        )
        require(
            config,
            len(data.labels) < config.tokenizer.vocab_size,
            "data.labels",
            f"must be fewer than tokenizer.vocab_size={config.tokenizer.vocab_size}, as a token store holds indices",
        )
    require(
        config,
        not data.messages_field,
        "data.messages_field",
        f"needs data.objective=supervised, not {objective}; use data.inputs_template",
    )
    require(
        config,
        config.tokenizer.num_sentinels >= 2,
        "tokenizer.num_sentinels",
        f"must be at least 2 for data.objective={objective}, whose rows begin with [CLS], <extra_id_1>; use 2",
    )
    if objective == "token_classification":
        require(config, not data.second_template, "data.second_template", _alone(objective))
        require(config, config.model.pooling == "first", "model.pooling", f"has no use for {objective}; use first")


def _use(field: str) -> str:
    return "classification" if field == "second_template" else "classification or token_classification"


def _alone(objective: str) -> str:
    return f"needs data.objective=classification or regression, not {objective}"
