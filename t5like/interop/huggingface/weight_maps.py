"""One table per family: which of their tensors is which of our parameters, and the transform between them.

A row reads both ways (`to_ours`, `to_theirs`), so that what was imported is exported bit for bit. Names are those that
transformers writes (5.24, `save_pretrained`); what older versions write besides is in `canonical` and `LEFT_OUT`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from t5like.config.schema import ModelConfig

ENCODER_DECODERS = ("t5", "mt5", "umt5")
DECODERS = ("llama", "qwen3", "mistral")  # of Llama's kind; and gpt2
LEFT_OUT = {  # tensors in files that are no weights: masks, positions, and a bias that T5 never reads
    "t5": r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    "llama": r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    "gpt2": r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",
    "bert": r"(bert\.)?embeddings\.position_ids",
}


class Row(NamedTuple):
    """One tensor of theirs, or one in each layer, and what it is here.

    Attributes:
        theirs: its name; {} stands for the number of the layer.
        ours: the parameter's name. Several: they lie behind each other in the last dim of theirs (GPT-2's c_attn).
        transpose: theirs is [outputs, inputs], as in torch's Linear.
        layers: how many; ours are stacked in front. 0: it is in no layer.
        vocabulary: its first dim counts tokens.
    """

    theirs: str
    ours: tuple[str, ...]
    transpose: bool = False
    layers: int = 0
    vocabulary: bool = False

    def places(self) -> Iterator[tuple[str, int | None]]:
        """Each of their names, and the layer."""
        yield from ((self.theirs.format(y), y) for y in range(self.layers)) if self.layers else ((self.theirs, None),)


def shape_of(row: Row, ours: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of a row's tensor, by those of our parameters."""
    parts = [ours[name].shape[1:] if row.layers else ours[name].shape for name in row.ours]
    joined = (*parts[0][:-1], sum(part[-1] for part in parts))
    return joined[::-1] if row.transpose else joined


def to_ours(row: Row, theirs: np.ndarray) -> list[np.ndarray]:
    """One tensor of theirs as the parts (of one layer) that it is here."""
    return np.split(theirs.T if row.transpose else theirs, len(row.ours), axis=-1)


def to_theirs(row: Row, parts: Sequence[np.ndarray]) -> np.ndarray:
    """What `to_ours` undoes."""
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
    return joined.T if row.transpose else joined


def table(family: str, model: ModelConfig) -> list[Row]:
    """All rows of a family for a model that it can express."""
    if family in ENCODER_DECODERS:
        return _t5(model)
    return {"gpt2": _gpt2, "bert": _bert}.get(family, _llama)(model)


def canonical(family: str, name: str, *, tied: bool) -> str | None:
    """The table's name for a tensor in a file; several may have the same, they are copies. None: it is no weight.

    Args:
        tied: the output head is the embedding, so a head in the file is a copy of it.
    """
    kind = "t5" if family in ENCODER_DECODERS else "llama" if family in DECODERS else family
    if re.fullmatch(LEFT_OUT[kind], name):
        return None
    if kind == "gpt2":  # OpenAI's release has no prefix
        name = f"transformer.{name}" if re.match(r"(h|wte|wpe|ln_f)\.", name) else name
    if kind == "bert":  # Google's release has TensorFlow's names of a norm's parameters
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    return {
        "t5": {"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"}
        | ({"lm_head.weight": "shared.weight"} if tied else {}),
        "llama": {"lm_head.weight": "model.embed_tokens.weight"} if tied else {},
        "gpt2": {"lm_head.weight": "transformer.wte.weight"} if tied else {},
        "bert": {
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
    }[kind].get(name, name)


def _dense(theirs: str, ours: str, layers: int, *, biases: bool) -> list[Row]:
    """A Linear's weight and, where there are any, bias."""
    return [Row(f"{theirs}.weight", (f"{ours}/kernel",), True, layers)] + (
        [Row(f"{theirs}.bias", (f"{ours}/bias",), layers=layers)] if biases else []
    )


def _norm(theirs: str, ours: str, layers: int = 0, *, bias: bool = False) -> list[Row]:
    return [Row(f"{theirs}.weight", (f"{ours}/scale",), layers=layers)] + (
        [Row(f"{theirs}.bias", (f"{ours}/bias",), layers=layers)] if bias else []
    )


def _t5(model: ModelConfig) -> list[Row]:
    rows = [Row("shared.weight", ("embedding",), vocabulary=True)]
    for side, layers in (("encoder", model.num_layers), ("decoder", model.decoder_layers)):
        block, ours = f"{side}.block.{{}}.layer", f"{side}/layers"
        attentions = [("0.SelfAttention", "attention")]
        attentions += [("1.EncDecAttention", "cross_attention")] if side == "decoder" else []
        for theirs, name in attentions:
            for part in ("query", "key", "value", "out"):
                rows += _dense(f"{block}.{theirs}.{part[0]}", f"{ours}/{name}/{part}", layers, biases=False)
            rows += _norm(f"{block}.{theirs[0]}.layer_norm", f"{ours}/{name}_norm", layers)
        bias = "layer.0.SelfAttention.relative_attention_bias.weight"
        if model.relative_bias == "per_layer":
            rows.append(Row(f"{side}.block.{{}}.{bias}", (f"{ours}/relative_bias/table",), layers=layers))
        else:
            rows.append(Row(f"{side}.block.0.{bias}", (f"{side}/relative_bias/table",)))
        last = len(attentions)
        wide = {"wi_0": "gate", "wi_1": "in"} if model.mlp.startswith("gated") else {"wi": "in"}
        for theirs, name in {**wide, "wo": "out"}.items():
            rows += _dense(f"{block}.{last}.DenseReluDense.{theirs}", f"{ours}/mlp/{name}", layers, biases=False)
        rows += _norm(f"{block}.{last}.layer_norm", f"{ours}/mlp_norm", layers)
        rows += _norm(f"{side}.final_layer_norm", f"{side}/final_norm")
    return rows + ([] if model.tied_embeddings else [Row("lm_head.weight", ("head",), True, vocabulary=True)])


def _llama(model: ModelConfig) -> list[Row]:
    block, ours, layers = "model.layers.{}", "decoder/layers", model.num_layers
    rows = [Row("model.embed_tokens.weight", ("embedding",), vocabulary=True)]
    for theirs, name in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
        rows += _dense(f"{block}.self_attn.{theirs}_proj", f"{ours}/attention/{name}", layers, biases=model.biases)
    if model.qk_norm:
        rows += _norm(f"{block}.self_attn.q_norm", f"{ours}/attention/query_norm", layers)
        rows += _norm(f"{block}.self_attn.k_norm", f"{ours}/attention/key_norm", layers)
    for theirs, name in (("gate", "gate"), ("up", "in"), ("down", "out")):
        rows += _dense(f"{block}.mlp.{theirs}_proj", f"{ours}/mlp/{name}", layers, biases=model.biases)
    rows += _norm(f"{block}.input_layernorm", f"{ours}/attention_norm", layers)
    rows += _norm(f"{block}.post_attention_layernorm", f"{ours}/mlp_norm", layers)
    rows += _norm("model.norm", "decoder/final_norm")
    return rows + ([] if model.tied_embeddings else [Row("lm_head.weight", ("head",), True, vocabulary=True)])


def _gpt2(model: ModelConfig) -> list[Row]:
    block, ours, layers = "transformer.h.{}", "decoder/layers", model.num_layers
    rows = [
        Row("transformer.wte.weight", ("embedding",), vocabulary=True),
        Row("transformer.wpe.weight", ("positions",)),
    ]
    joined = ("query", "key", "value")  # GPT-2's Conv1D is [inputs, outputs], as ours
    for theirs, names in (
        ("attn.c_attn", [f"attention/{name}" for name in joined]),
        ("attn.c_proj", ["attention/out"]),
        ("mlp.c_fc", ["mlp/in"]),
        ("mlp.c_proj", ["mlp/out"]),
    ):
        for kind, leaf in (("weight", "kernel"), ("bias", "bias")):
            rows.append(
                Row(f"{block}.{theirs}.{kind}", tuple(f"{ours}/{name}/{leaf}" for name in names), layers=layers)
            )
    rows += _norm(f"{block}.ln_1", f"{ours}/attention_norm", layers, bias=True)
    rows += _norm(f"{block}.ln_2", f"{ours}/mlp_norm", layers, bias=True)
    rows += _norm("transformer.ln_f", "decoder/final_norm", bias=True)
    return rows + ([] if model.tied_embeddings else [Row("lm_head.weight", ("head",), True, vocabulary=True)])


def _bert(model: ModelConfig) -> list[Row]:
    block, ours, layers = "bert.encoder.layer.{}", "encoder/layers", model.num_layers
    rows = [
        Row("bert.embeddings.word_embeddings.weight", ("embedding",), vocabulary=True),
        Row("bert.embeddings.position_embeddings.weight", ("positions",)),
        Row("bert.embeddings.token_type_embeddings.weight", ("token_types",)),
        *_norm("bert.embeddings.LayerNorm", "embedding_norm", bias=True),
    ]
    for theirs, name in (
        ("attention.self.query", "attention/query"),
        ("attention.self.key", "attention/key"),
        ("attention.self.value", "attention/value"),
        ("attention.output.dense", "attention/out"),
        ("intermediate.dense", "mlp/in"),
        ("output.dense", "mlp/out"),
    ):
        rows += _dense(f"{block}.{theirs}", f"{ours}/{name}", layers, biases=True)
    rows += _norm(f"{block}.attention.output.LayerNorm", f"{ours}/attention_norm", layers, bias=True)
    rows += _norm(f"{block}.output.LayerNorm", f"{ours}/mlp_norm", layers, bias=True)
    if model.next_sentence_head:
        rows += _dense("bert.pooler.dense", "pairs/pooler", 0, biases=True)
        rows += _dense("cls.seq_relationship", "pairs/classes", 0, biases=True)
    rows += _dense("cls.predictions.transform.dense", "mlm/dense", 0, biases=True)
    rows += _norm("cls.predictions.transform.LayerNorm", "mlm/norm", bias=True)
    return [*rows, Row("cls.predictions.bias", ("head_bias",), vocabulary=True)]
