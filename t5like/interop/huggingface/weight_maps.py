"""The weight map of each family: which Hugging Face tensor is which t5like parameter, and the transform between them.

The transform is invertible (`from_huggingface`, `to_huggingface`), so that imported tensors are exported bit for bit.
Names are those of transformers 5.24 (`save_pretrained`); `canonical_name` and `IGNORED` handle those of older versions.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from t5like.config.model_schema import ModelConfig

ENCODER_DECODERS = ("t5", "mt5", "umt5")
DECODERS = ("llama", "qwen3", "mistral")  # with the tensors of Llama
GEMMAS = ("gemma2", "gemma3_text")
T5GEMMAS = ("t5gemma", "t5gemma2")
LIKE_LLAMA = (*DECODERS, "eurobert")  # EuroBERT is an encoder with them
T5GEMMA2_EMBEDDING = "model.encoder.embed_tokens.weight"
IGNORED = {  # tensors in files that are not weights: masks, positions, and a bias that T5 never uses
    "t5": r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    "llama": r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    "gpt2": r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",
    "bert": r"(bert\.)?embeddings\.position_ids",
    "t5gemma": r"(model\.)?rotary_emb\.inv_freq",
    # images, and an embedding in place of one token's that ends an image
    "t5gemma2": r"model\.encoder\.(vision_tower|multi_modal_projector)\..*|model\..*\.embed_tokens\.eoi_embedding",
    "modernbert": r"model\.layers\.\d+\.attn\.rotary_emb\.inv_freq",
}


class TensorMap(NamedTuple):
    """One Hugging Face tensor, or one per layer, and its parameters in t5like.

    Attributes:
        hf_name: the tensor's name; {} stands for the number of the layer.
        params: the parameter's name. Several: concatenated in the last dim of the tensor (GPT-2's c_attn).
        transpose: the tensor is [outputs, inputs], as in torch's Linear.
        layers: number of layers; the parameter is stacked over them, in its first dim. 0: not in a layer.
        first: the first layer that has the tensor; the parameters of earlier layers are 1, and unused.
        vocabulary: the tensor's first dim is the vocabulary.
    """

    hf_name: str
    params: tuple[str, ...]
    transpose: bool = False
    layers: int = 0
    first: int = 0
    vocabulary: bool = False

    def names(self) -> Iterator[tuple[str, int | None]]:
        """The name of each tensor, and its layer."""
        if not self.layers:
            yield self.hf_name, None
        for y in range(self.first, self.layers):
            yield self.hf_name.format(y), y


def shape_of(entry: TensorMap, params: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of an entry's tensor, from the shapes of its parameters."""
    parts = [params[name].shape[1:] if entry.layers else params[name].shape for name in entry.params]
    joined = (*parts[0][:-1], sum(part[-1] for part in parts))
    return joined[::-1] if entry.transpose else joined


def from_huggingface(entry: TensorMap, tensor: np.ndarray) -> list[np.ndarray]:
    """One Hugging Face tensor as the parameters (of one layer) that it contains."""
    return np.split(tensor.T if entry.transpose else tensor, len(entry.params), axis=-1)


def to_huggingface(entry: TensorMap, parts: Sequence[np.ndarray]) -> np.ndarray:
    """The inverse of `from_huggingface`."""
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
    return joined.T if entry.transpose else joined


def weight_map(family: str, model: ModelConfig) -> list[TensorMap]:
    """The weight map of a family for a model that it can represent."""
    if family in ENCODER_DECODERS:
        return _t5(model)
    if family in (*GEMMAS, *T5GEMMAS):
        return _gemma(family, model)
    return {"gpt2": _gpt2, "bert": _bert, "modernbert": _modernbert}.get(family, _llama)(model)


def canonical_name(family: str, name: str, *, tied: bool) -> str | None:
    """The name in the weight map of a tensor in a file. Tensors with the same name are copies. None: not a weight.

    Args:
        tied: the output head is the embedding, so that a head in the file is a copy of it.
    """
    layout = "t5" if family in ENCODER_DECODERS else "llama" if family in (*LIKE_LLAMA, *GEMMAS) else family
    if re.fullmatch(IGNORED[layout], name):
        return None
    if layout == "gpt2":  # OpenAI's release has no prefix
        name = f"transformer.{name}" if re.match(r"(h|wte|wpe|ln_f)\.", name) else name
    if layout == "t5gemma2":  # as in files; the module itself has one more level
        name = name.replace("model.encoder.text_model.", "model.encoder.")
    if family in GEMMAS and not name.startswith(("model.", "lm_head.")):  # a model that was saved without its head
        name = f"model.{name}"
    if layout == "bert":  # Google's release has TensorFlow's names of a norm's parameters
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
        "t5gemma": {"lm_head.out_proj.weight": "model.decoder.embed_tokens.weight"} if tied else {},
        "t5gemma2": dict.fromkeys(("lm_head.out_proj.weight", "model.decoder.embed_tokens.weight"), T5GEMMA2_EMBEDDING),
        "modernbert": {"decoder.weight": "model.embeddings.tok_embeddings.weight"} if tied else {},
    }[layout].get(name, name)


def _dense(hf_name: str, params: str | Sequence[str], layers: int, *, biases: bool) -> list[TensorMap]:
    """The weight of a Linear, and its bias if it has one; several layers of t5like may be one Linear."""
    leaves = lambda leaf: tuple(f"{param}/{leaf}" for param in ([params] if isinstance(params, str) else params))
    return [TensorMap(f"{hf_name}.weight", leaves("kernel"), True, layers)] + (
        [TensorMap(f"{hf_name}.bias", leaves("bias"), layers=layers)] if biases else []
    )


def _norm(hf_name: str, param: str, layers: int = 0, *, first: int = 0, bias: bool = False) -> list[TensorMap]:
    return [TensorMap(f"{hf_name}.weight", (f"{param}/scale",), layers=layers, first=first)] + (
        [TensorMap(f"{hf_name}.bias", (f"{param}/bias",), layers=layers, first=first)] if bias else []
    )


def _t5(model: ModelConfig) -> list[TensorMap]:
    entries = [TensorMap("shared.weight", ("embedding",), vocabulary=True)]
    for side, layers in (("encoder", model.num_layers), ("decoder", model.decoder_layers)):
        block, layer = f"{side}.block.{{}}.layer", f"{side}/layers"
        attentions = [("0.SelfAttention", "attention")]
        attentions += [("1.EncDecAttention", "cross_attention")] if side == "decoder" else []
        for hf_name, name in attentions:
            for part in ("query", "key", "value", "out"):
                entries += _dense(f"{block}.{hf_name}.{part[0]}", f"{layer}/{name}/{part}", layers, biases=False)
            entries += _norm(f"{block}.{hf_name[0]}.layer_norm", f"{layer}/{name}_norm", layers)
        bias = "layer.0.SelfAttention.relative_attention_bias.weight"
        if model.relative_bias == "per_layer":
            entries.append(TensorMap(f"{side}.block.{{}}.{bias}", (f"{layer}/relative_bias/table",), layers=layers))
        else:
            entries.append(TensorMap(f"{side}.block.0.{bias}", (f"{side}/relative_bias/table",)))
        last = len(attentions)
        inputs = {"wi_0": "gate", "wi_1": "in"} if model.mlp.startswith("gated") else {"wi": "in"}
        for hf_name, name in {**inputs, "wo": "out"}.items():
            entries += _dense(f"{block}.{last}.DenseReluDense.{hf_name}", f"{layer}/mlp/{name}", layers, biases=False)
        entries += _norm(f"{block}.{last}.layer_norm", f"{layer}/mlp_norm", layers)
        entries += _norm(f"{side}.final_layer_norm", f"{side}/final_norm")
    return entries + ([] if model.tied_embeddings else [TensorMap("lm_head.weight", ("head",), True, vocabulary=True)])


def _llama(model: ModelConfig) -> list[TensorMap]:
    stack = "decoder" if model.has_decoder else "encoder"
    block, layer, layers = "model.layers.{}", f"{stack}/layers", model.num_layers
    entries = [TensorMap("model.embed_tokens.weight", ("embedding",), vocabulary=True)]
    for hf_name, name in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
        entries += _dense(f"{block}.self_attn.{hf_name}_proj", f"{layer}/attention/{name}", layers, biases=model.biases)
    if model.qk_norm:
        entries += _norm(f"{block}.self_attn.q_norm", f"{layer}/attention/query_norm", layers)
        entries += _norm(f"{block}.self_attn.k_norm", f"{layer}/attention/key_norm", layers)
    for hf_name, name in (("gate", "gate"), ("up", "in"), ("down", "out")):
        entries += _dense(f"{block}.mlp.{hf_name}_proj", f"{layer}/mlp/{name}", layers, biases=model.biases)
    entries += _norm(f"{block}.input_layernorm", f"{layer}/attention_norm", layers)
    entries += _norm(f"{block}.post_attention_layernorm", f"{layer}/mlp_norm", layers)
    entries += _norm("model.norm", f"{stack}/final_norm")
    return entries + ([] if model.tied_embeddings else [TensorMap("lm_head.weight", ("head",), True, vocabulary=True)])


def _gpt2(model: ModelConfig) -> list[TensorMap]:
    block, layer, layers = "transformer.h.{}", "decoder/layers", model.num_layers
    entries = [
        TensorMap("transformer.wte.weight", ("embedding",), vocabulary=True),
        TensorMap("transformer.wpe.weight", ("positions",)),
    ]
    joined = ("query", "key", "value")  # GPT-2's Conv1D is [inputs, outputs], as in t5like
    for hf_name, names in (
        ("attn.c_attn", [f"attention/{name}" for name in joined]),
        ("attn.c_proj", ["attention/out"]),
        ("mlp.c_fc", ["mlp/in"]),
        ("mlp.c_proj", ["mlp/out"]),
    ):
        for suffix, leaf in (("weight", "kernel"), ("bias", "bias")):
            entries.append(
                TensorMap(
                    f"{block}.{hf_name}.{suffix}", tuple(f"{layer}/{name}/{leaf}" for name in names), layers=layers
                )
            )
    entries += _norm(f"{block}.ln_1", f"{layer}/attention_norm", layers, bias=True)
    entries += _norm(f"{block}.ln_2", f"{layer}/mlp_norm", layers, bias=True)
    entries += _norm("transformer.ln_f", "decoder/final_norm", bias=True)
    return entries + ([] if model.tied_embeddings else [TensorMap("lm_head.weight", ("head",), True, vocabulary=True)])


def _bert(model: ModelConfig) -> list[TensorMap]:
    block, layer, layers = "bert.encoder.layer.{}", "encoder/layers", model.num_layers
    entries = [
        TensorMap("bert.embeddings.word_embeddings.weight", ("embedding",), vocabulary=True),
        TensorMap("bert.embeddings.position_embeddings.weight", ("positions",)),
        TensorMap("bert.embeddings.token_type_embeddings.weight", ("token_types",)),
        *_norm("bert.embeddings.LayerNorm", "embedding_norm", bias=True),
    ]
    for hf_name, name in (
        ("attention.self.query", "attention/query"),
        ("attention.self.key", "attention/key"),
        ("attention.self.value", "attention/value"),
        ("attention.output.dense", "attention/out"),
        ("intermediate.dense", "mlp/in"),
        ("output.dense", "mlp/out"),
    ):
        entries += _dense(f"{block}.{hf_name}", f"{layer}/{name}", layers, biases=True)
    entries += _norm(f"{block}.attention.output.LayerNorm", f"{layer}/attention_norm", layers, bias=True)
    entries += _norm(f"{block}.output.LayerNorm", f"{layer}/mlp_norm", layers, bias=True)
    if model.next_sentence_head:
        entries += _dense("bert.pooler.dense", "pairs/pooler", 0, biases=True)
        entries += _dense("cls.seq_relationship", "pairs/classes", 0, biases=True)
    entries += _dense("cls.predictions.transform.dense", "mlm/dense", 0, biases=True)
    entries += _norm("cls.predictions.transform.LayerNorm", "mlm/norm", bias=True)
    return [*entries, TensorMap("cls.predictions.bias", ("head_bias",), vocabulary=True)]


def _modernbert(model: ModelConfig) -> list[TensorMap]:
    block, layer, layers = "model.layers.{}", "encoder/layers", model.num_layers
    norm = partial(_norm, bias=model.norm_bias)
    entries = [TensorMap("model.embeddings.tok_embeddings.weight", ("embedding",), vocabulary=True)]
    for hf_name, names in (
        ("attn.Wqkv", ("attention/query", "attention/key", "attention/value")),
        ("attn.Wo", ("attention/out",)),
        ("mlp.Wi", ("mlp/gate", "mlp/in")),  # the activation is on the first half
        ("mlp.Wo", ("mlp/out",)),
    ):
        params = [f"{layer}/{name}" for name in names]
        entries += _dense(f"{block}.{hf_name}", params, layers, biases=model.biases)
    entries += norm("model.embeddings.norm", "embedding_norm")
    entries += norm(f"{block}.attn_norm", f"{layer}/attention_norm", layers=layers, first=1)
    entries += norm(f"{block}.mlp_norm", f"{layer}/mlp_norm", layers=layers)
    entries += norm("model.final_norm", "encoder/final_norm")
    entries += _dense("head.dense", "mlm/dense", 0, biases=model.biases)
    entries += norm("head.norm", "mlm/norm")
    entries.append(TensorMap("decoder.bias", ("head_bias",), vocabulary=True))
    return entries + ([] if model.tied_embeddings else [TensorMap("decoder.weight", ("head",), True, vocabulary=True)])


def _gemma(family: str, model: ModelConfig) -> list[TensorMap]:
    """Gemma 2 and 3 and T5Gemma 1 and 2, whose stacks are alike but for the names of norms."""
    if family in GEMMAS:
        norms = {"attention": "input_layernorm", "attention_output": "post_attention_layernorm"}
        entries = _gemma_stack("model", "decoder", model.num_layers, norms, model)
        head = "lm_head.weight"
    else:
        norms = {"attention": "pre_self_attn_layernorm", "attention_output": "post_self_attn_layernorm"}
        entries = _gemma_stack("model.encoder", "encoder", model.num_layers, norms, model)
        if not model.merged_attention:
            norms |= {"cross_attention": "pre_cross_attn_layernorm"}
            norms |= {"cross_attention_output": "post_cross_attn_layernorm"}
        entries += _gemma_stack("model.decoder", "decoder", model.decoder_layers, norms, model)
        head = "lm_head.out_proj.weight"
    return entries + ([] if model.tied_embeddings else [TensorMap(head, ("head",), True, vocabulary=True)])


def _gemma_stack(place: str, stack: str, layers: int, norms: Mapping[str, str], model: ModelConfig) -> list[TensorMap]:
    block, layer, entries = f"{place}.layers.{{}}", f"{stack}/layers", []
    if stack == "encoder" or not model.has_encoder or model.separate_embeddings:
        embedding = "decoder_embedding" if model.has_encoder and stack == "decoder" else "embedding"
        entries.append(TensorMap(f"{place}.embed_tokens.weight", (embedding,), vocabulary=True))
    for hf_name, name in {"self_attn": "attention", "cross_attn": "cross_attention"}.items():
        if name not in norms:
            continue
        for part, param in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
            entries += _dense(f"{block}.{hf_name}.{part}_proj", f"{layer}/{name}/{param}", layers, biases=False)
        if model.qk_norm:
            for part, param in (("q", "query"), ("k", "key")):
                entries += _norm(f"{block}.{hf_name}.{part}_norm", f"{layer}/{name}/{param}_norm", layers)
    for part, param in (("gate", "gate"), ("up", "in"), ("down", "out")):
        entries += _dense(f"{block}.mlp.{part}_proj", f"{layer}/mlp/{param}", layers, biases=False)
    mlp = {"mlp": "pre_feedforward_layernorm", "mlp_output": "post_feedforward_layernorm"}
    for name, hf_name in {**norms, **mlp}.items():
        entries += _norm(f"{block}.{hf_name}", f"{layer}/{name}_norm", layers)
    return entries + _norm(f"{place}.norm", f"{stack}/final_norm")
