"""Makes hf_encoder_logits.npz: as make_hf_logits.py, by random_hf_models.py, for ModernBERT and EuroBERT.

pip install torch==2.13.0 transformers==5.* && python tests/golden/make_hf_encoder_logits.py
"""

import torch
import transformers
from random_hf_models import save_goldens
from transformers import EuroBertConfig, EuroBertForMaskedLM, ModernBertConfig, ModernBertForMaskedLM

SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "pad_token_id": 0}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2}
MODERN = {**SIZES, "num_hidden_layers": 4, "local_attention": 12, "cls_token_id": 1, "sep_token_id": 2}
ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 500.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
}
MODELS = {
    # four layers, of which the first and the last are global: the pattern of ModernBERT base does not repeat evenly
    "modernbert": ModernBertForMaskedLM(ModernBertConfig(rope_parameters=ROPE, **MODERN)),
    # with every bias, another activation, a head of its own, and local layers alone
    "modernbert_biased": ModernBertForMaskedLM(
        ModernBertConfig(
            **MODERN | {"num_hidden_layers": 2, "layer_types": ["sliding_attention"] * 2},
            rope_parameters=dict.fromkeys(ROPE, ROPE["sliding_attention"]),
            norm_bias=True,
            attention_bias=True,
            mlp_bias=True,
            classifier_bias=True,
            hidden_activation="silu",
            classifier_activation="silu",
            tie_word_embeddings=False,
        )
    ),
    "eurobert": EuroBertForMaskedLM(
        EuroBertConfig(
            **SIZES, mask_token_id=3, num_hidden_layers=2, num_key_value_heads=2, rope_parameters={"rope_theta": 250.0}
        )
    ),
    "eurobert_tied": EuroBertForMaskedLM(
        EuroBertConfig(**SIZES, mask_token_id=3, num_hidden_layers=1, tie_word_embeddings=True)
    ),
}


def weights_of(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """All tensors; a tied head is that of the embedding."""
    tied = {"decoder.weight", "lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {key: value for key, value in model.state_dict().items() if key not in tied}


save_goldens("hf_encoder_logits.npz", MODELS, weights_of)
