"""Makes hf_encoder_logits.npz: as make_hf_logits.py, for ModernBERT and EuroBERT.

    pip install torch==2.13.0 transformers==5.* && python tests/golden/make_hf_encoder_logits.py

The texts have 40 tokens, more than the windows of 6 on each side; the second one is padded.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
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
    with torch.no_grad():
        out[f"{name}.logits"] = model.eval()(**inputs).logits.float().numpy()
    out |= {f"{name}.inputs.{key}": value.numpy() for key, value in inputs.items()}
    tied = {"decoder.weight", "lm_head.weight"} if model.config.tie_word_embeddings else set()
    out |= {
        f"{name}.weights.{key}": value.numpy().astype(np.float16)
        for key, value in model.state_dict().items()
        if key not in tied
    }
np.savez_compressed(Path(__file__).parent / "hf_encoder_logits.npz", **out)
