"""Export of models that predict labels: BERT's classes of transformers for texts and for tokens.

    classification, regression    BertForSequenceClassification: pooler of the first token, then the classes
    token_classification          BertForTokenClassification: the classes of each token

Called by `families`, `convert`, `logits_check` and `card`.
"""

from typing import Any

from t5like.config.schema import Config
from t5like.errors import CheckpointError
from t5like.interop.huggingface.weight_maps import TensorMap, weight_map

TASKS = {  # AutoModelFor... of transformers
    "classification": "SequenceClassification",
    "regression": "SequenceClassification",
    "token_classification": "TokenClassification",
}
TAGS = {"SequenceClassification": "text-classification", "TokenClassification": "token-classification"}
OTHER_HEADS = ("pairs/", "mlm/", "head_bias")


def check_exportable(family: str, config: Config) -> None:
    """Refuse a model that predicts labels and has no class in transformers.

    Raises:
        CheckpointError: names field, value, and what can be exported.
    """
    objective = config.data.label_objective
    if objective and family != "bert":
        raise CheckpointError(
            f"data.objective={objective}: of models that predict labels only BERT's can be exported, not {family}; use "
            "t5like predict, or --family=bert for a model like BERT"
        )
    if objective and config.model.pooling != "first":
        raise CheckpointError(
            f"model.pooling={config.model.pooling} has no class in transformers, which reads the first token; train "
            "with model.pooling=first to export"
        )


def tensors(family: str, config: Config) -> list[TensorMap]:
    """The weight map of a model; with the head for labels instead of those for tokens and pairs if it has one."""
    entries = weight_map(family, config.model)
    if config.data.label_objective is None:
        return entries
    entries = [entry for entry in entries if not entry.params[0].startswith(OTHER_HEADS)]
    layers = {"classifier": "classes"}
    if TASKS[config.data.label_objective] == "SequenceClassification":
        layers["bert.pooler.dense"] = "pooler"
    for hf_name, name in layers.items():
        entries.append(TensorMap(f"{hf_name}.weight", (f"label_head/{name}/kernel",), transpose=True))
        entries.append(TensorMap(f"{hf_name}.bias", (f"label_head/{name}/bias",)))
    return entries


def keys(config: Config) -> dict[str, Any]:
    """The keys of config.json for a head for labels; empty without one."""
    objective = config.data.label_objective
    if objective is None:
        return {}
    names = config.data.labels or ("LABEL_0",)
    problem = {"classification": "single_label_classification", "regression": "regression"}
    return {
        "architectures": [f"BertFor{TASKS[objective]}"],
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
        **({"problem_type": problem[objective]} if objective in problem else {}),
    }
