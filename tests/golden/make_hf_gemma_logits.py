"""Makes hf_gemma_logits.npz: as make_hf_logits.py, by random_hf_models.py, for Gemma 2 and 3, T5Gemma 1 and 2.

pip install torch==2.13.0 transformers==5.* && python tests/golden/make_hf_gemma_logits.py
"""

import torch
import transformers
from random_hf_models import save_goldens
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    T5Gemma2Config,
    T5Gemma2ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
)

SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 6}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 6, "query_pre_attn_scalar": 5}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
}
# A decoder of another size, with twice the layers: one pattern for both.
DECODER = {**SIZES, "hidden_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 4}
VISION = {"model_type": "siglip_vision_model", "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 1, "image_size": 16, "patch_size": 1}
LOCAL_GLOBAL = {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": ROPE}
GLOBAL = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
MODELS = {
    "gemma2": Gemma2ForCausalLM(Gemma2Config(**SIZES, **CAPS)),
    # three layers, of which the second is global: the pattern does not repeat evenly, as in Gemma 3 1B
    "gemma3": Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZES | {"num_hidden_layers": 3},
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters=ROPE,
        )
    ),
    "t5gemma": T5GemmaForConditionalGeneration(
        T5GemmaConfig(encoder={**SIZES, **CAPS}, decoder={**DECODER, **CAPS, "intermediate_size": 20}, vocab_size=61)
    ),
    "t5gemma_untied": T5GemmaForConditionalGeneration(
        T5GemmaConfig(
            encoder={**SIZES, **GLOBAL}, decoder={**SIZES, **GLOBAL}, vocab_size=61, tie_word_embeddings=False
        )
    ),
    "t5gemma2": T5Gemma2ForConditionalGeneration(
        T5Gemma2Config(
            encoder={"text_config": {**SIZES, **LOCAL_GLOBAL}, "vision_config": VISION},
            decoder={**SIZES, **LOCAL_GLOBAL},
        )
    ),
}


def weights_of(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors of the text part by their names in files, shared ones once."""
    weights: dict[str, torch.Tensor] = {}
    for key, value in model.state_dict().items():
        is_copy = value.data_ptr() in [kept.data_ptr() for kept in weights.values()]
        if not is_copy and "vision_tower" not in key and "multi_modal" not in key:
            weights[key.replace(".text_model", "")] = value
    return weights


save_goldens("hf_gemma_logits.npz", MODELS, weights_of)
