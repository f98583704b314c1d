"""Makes hf_logits.npz: weights, inputs and logits of small random Hugging Face models, so that tests need no PyTorch.

    pip install torch==2.13.0 transformers==5.* && python tests/golden/make_hf_logits.py

Run it again only to add a family: those that the file has stay as they are. The versions that made it are stored in it.
"""

from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import (
    BertConfig,
    BertForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

FILE = Path(__file__).parent / "hf_logits.npz"
T5 = {
    "vocab_size": 61,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_heads": 4,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
MODELS = {
    "t5_1_0": T5ForConditionalGeneration(T5Config(num_layers=2, num_decoder_layers=2, feed_forward_proj="relu", **T5)),
    "t5_1_1": T5ForConditionalGeneration(
        T5Config(num_layers=2, num_decoder_layers=3, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **T5)
    ),
    "llama": LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    ),
    "gpt2": GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_positions=64, n_embd=16, bos_token_id=0, eos_token_id=0, n_layer=2, n_head=4)
    ),
    "bert": BertForPreTraining(
        BertConfig(
            vocab_size=61,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    ),
}

out = {"versions": np.array([torch.__version__, transformers.__version__])} | (
    dict(np.load(FILE)) if FILE.exists() else {}
)
for name, model in MODELS.items():
    if f"{name}.logits" in out:
        continue
    torch.manual_seed(0)
    for parameter in model.parameters():  # larger than at initialisation, so that every part shows in the logits
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    model.eval()
    ids = torch.randint(1, 61, (2, 40))
    inputs = {"input_ids": ids}
    if name.startswith("t5"):
        mask = torch.ones_like(ids)
        mask[1, 29:] = 0
        inputs |= {"attention_mask": mask, "decoder_input_ids": torch.randint(0, 61, (2, 21))}
    if name == "bert":
        mask = torch.ones_like(ids)
        mask[1, 29:] = 0
        inputs |= {
            "attention_mask": mask,
            "token_type_ids": (torch.arange(40)[None] >= torch.tensor([[13], [20]])).long(),
        }
    with torch.no_grad():
        made = model(**inputs)
    if name == "bert":
        out[f"{name}.pair_logits"] = made.seq_relationship_logits.float().numpy()
    out[f"{name}.logits"] = (made.prediction_logits if name == "bert" else made.logits).float().numpy()
    out |= {f"{name}.inputs.{key}": value.numpy() for key, value in inputs.items()}
    out |= {
        f"{name}.weights.{key}": value.float().numpy()
        for key, value in model.state_dict().items()
        if "embed_tokens.weight" not in key or name == "llama"
    }  # T5's are copies of `shared`

# ---- Buckets of relative positions ----

attention = MODELS["t5_1_1"].encoder.block[0].layer[0].SelfAttention
distance = torch.arange(-1000, 1001)
out["buckets.distance"] = distance.numpy()
for bidirectional in (True, False):
    out[f"buckets.{bidirectional}"] = attention._relative_position_bucket(distance, bidirectional, 32, 128).numpy()
np.savez_compressed(FILE, **out)
