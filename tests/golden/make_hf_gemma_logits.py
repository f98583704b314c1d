"""Makes hf_gemma_logits.npz: as make_hf_logits.py, for Gemma 2 and 3, T5Gemma 1 and 2.

    pip install torch==2.13.0 transformers==5.* && python tests/golden/make_hf_gemma_logits.py

The texts have 40 tokens, and 21 in the decoder, more than the windows; the second one is padded.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
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

out = {"versions": np.array([torch.__version__, transformers.__version__])}
for name, model in MODELS.items():
    with tempfile.TemporaryDirectory() as directory:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(directory)
        out[f"{name}.config"] = np.array((Path(directory) / "config.json").read_text())
    torch.manual_seed(0)
    for parameter in model.parameters():  # larger than at initialisation, so that every part shows in the logits
        torch.nn.init.normal_(parameter, 0.0, 0.3)
        parameter.data = parameter.data.half().float()
    inputs = {
        "input_ids": torch.randint(1, 61, (2, 40)),
        "attention_mask": (torch.arange(40)[None] < torch.tensor([[40], [29]])).long(),
    }
    if "t5" in name:
        decoder_ids = torch.randint(1, 61, (2, 21))
        inputs |= {"decoder_input_ids": decoder_ids, "decoder_attention_mask": torch.ones_like(decoder_ids)}
    with torch.no_grad():
        out[f"{name}.logits"] = model.eval()(**inputs).logits.float().numpy()
    out |= {f"{name}.inputs.{key}": value.numpy() for key, value in inputs.items()}
    weights = {}
    for key, value in model.state_dict().items():
        is_copy = value.data_ptr() in [kept.data_ptr() for kept in weights.values()]
        if not is_copy and "vision_tower" not in key and "multi_modal" not in key:
            weights[key.replace(".text_model", "")] = value  # the name in files
    out |= {f"{name}.weights.{key}": value.numpy().astype(np.float16) for key, value in weights.items()}
np.savez_compressed(Path(__file__).parent / "hf_gemma_logits.npz", **out)
