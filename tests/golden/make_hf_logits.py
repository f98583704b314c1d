"""Makes hf_logits.npz: configs, weights, inputs and logits of small random Hugging Face models; tests need no PyTorch.

    pip install torch==2.13.0 transformers==5.* && python tests/golden/make_hf_logits.py

Run it again only to add a family: those that the file has stay as they are. The versions that made it are stored in it,
or beside a family that was added later.
"""

import tempfile
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
    MistralConfig,
    MistralForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
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
DECODER = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def llama(**changes) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**DECODER, **changes}))


def rope(kind: str, factor: float, **more) -> dict:
    return {"rope_type": kind, "rope_theta": 10000.0, "factor": factor, **more}


def untied(model):
    """Its own output head, which transformers 5 only takes from files."""
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    model.config.tie_word_embeddings = False
    return model


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
    # From here on with fewer layers, weights rounded to float16, and padding; texts of 40 tokens, which is longer than
    # the windows, the original lengths and the furthest distance.
    "mt5": untied(MT5ForConditionalGeneration(MT5Config(num_layers=1, **T5))),
    "umt5": UMT5ForConditionalGeneration(UMT5Config(num_layers=2, **T5 | {"relative_attention_max_distance": 20})),
    "llama_linear": llama(rope_parameters=rope("linear", 4.0), attention_bias=True, mlp_bias=True),
    "llama_llama3": llama(
        head_dim=16,
        tie_word_embeddings=True,
        rope_parameters=rope(
            "llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
        ),
    ),
    "llama_yarn": llama(head_dim=16, rope_parameters=rope("yarn", 4.0, original_max_position_embeddings=16)),
    "qwen3": Qwen3ForCausalLM(Qwen3Config(head_dim=8, tie_word_embeddings=True, **DECODER)),
    "mistral": MistralForCausalLM(MistralConfig(sliding_window=8, **DECODER | {"num_hidden_layers": 2})),
}
ROUNDED = list(MODELS)[5:]

out = {"versions": np.array([torch.__version__, transformers.__version__])} | (
    dict(np.load(FILE)) if FILE.exists() else {}
)
for name, model in MODELS.items():
    if f"{name}.config" not in out:
        with tempfile.TemporaryDirectory() as directory:
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(directory)
            out[f"{name}.config"] = np.array((Path(directory) / "config.json").read_text())
    if f"{name}.logits" in out:
        continue
    out[f"{name}.versions"] = np.array([torch.__version__, transformers.__version__])
    torch.manual_seed(0)
    for parameter in model.parameters():  # larger than at initialisation, so that every part shows in the logits
        torch.nn.init.normal_(parameter, 0.0, 0.3)
        if name in ROUNDED:
            parameter.data = parameter.data.half().float()
    model.eval()
    ids = torch.randint(1, 61, (2, 40))
    inputs = {"input_ids": ids}
    if "t5" in name:
        mask = torch.ones_like(ids)
        mask[1, 29:] = 0
        inputs |= {"attention_mask": mask, "decoder_input_ids": torch.randint(0, 61, (2, 21))}
    elif name in ROUNDED:
        inputs["attention_mask"] = (torch.arange(40)[None] < torch.tensor([[40], [29]])).long()
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
        f"{name}.weights.{key}": value.numpy().astype(np.float16 if name in ROUNDED else np.float32)
        for key, value in model.state_dict().items()
        if ("embed_tokens.weight" not in key or "t5" not in name)  # T5's are copies of `shared`
        and not (key == "lm_head.weight" and name in ROUNDED and model.config.tie_word_embeddings)
    }

# ---- Buckets of relative positions ----

attention = MODELS["t5_1_1"].encoder.block[0].layer[0].SelfAttention
distance = torch.arange(-1000, 1001)
out["buckets.distance"] = distance.numpy()
for bidirectional in (True, False):
    out[f"buckets.{bidirectional}"] = attention._relative_position_bucket(distance, bidirectional, 32, 128).numpy()
np.savez_compressed(FILE, **out)
