"""Makes generate.npz: what transformers' `generate` makes of hf_logits.npz' models, so that tests need no PyTorch.

    pip install torch==2.13.0 transformers==5.* && python tests/golden/make_generate.py

Greedy texts and beam searches of T5 1.1, Llama and GPT-2, prompts of several lengths in one batch, with one or several
ids that end a text and without, with and without a repetition penalty; and logits that went through transformers'
processors for sampling. The versions that made it are stored in it.
"""

from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation import logits_process as processors

HERE = Path(__file__).parent
WEIGHTS = np.load(HERE / "hf_logits.npz")
NEW, EOS = 12, 1
LENGTHS = [3, 11, 7]
T5 = {
    "vocab_size": 61,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
LLAMA = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODELS = {
    "t5_1_1": T5ForConditionalGeneration(
        T5Config(num_layers=2, num_decoder_layers=3, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **T5)
    ),
    "llama": LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=64, n_embd=16, n_layer=2, n_head=4)),
}
SEARCHES = {
    "greedy": {},
    "greedy penalized": {"repetition_penalty": 1.7},
    "beams 0.6": {"num_beams": 4, "length_penalty": 0.6},
    "beams 1": {"num_beams": 4, "length_penalty": 1.0},
    "beams 2": {"num_beams": 4, "length_penalty": 2.0},
    "beams penalized": {"num_beams": 4, "length_penalty": 1.0, "repetition_penalty": 1.7},
}


def load(name: str) -> torch.nn.Module:
    """The model with the golden weights."""
    model = MODELS[name].eval()
    state = {
        key.split(".weights.")[1]: torch.tensor(WEIGHTS[key])
        for key in WEIGHTS.files
        if key.startswith(f"{name}.weights.")
    }
    if name == "t5_1_1":
        # transformers 5 ties T5's head whatever the config says.
        model.lm_head = torch.nn.Linear(16, 61, bias=False)
        model.tie_weights = lambda *_, **__: None
        state |= {f"{side}.embed_tokens.weight": state["shared.weight"] for side in ("encoder", "decoder")}
    model.load_state_dict(state, strict=True)
    return model


def searches(name: str) -> dict[str, np.ndarray]:
    """All searches of a family."""
    model, rng = load(name), np.random.default_rng(3)
    rows = [rng.integers(2, 61, length) for length in LENGTHS]
    longest = max(LENGTHS)
    left = name != "t5_1_1"
    pad = lambda row, filled: np.concatenate([np.zeros(longest - len(row), int), filled][:: 1 if left else -1])
    ids = torch.tensor(np.stack([pad(row, row) for row in rows]))
    mask = torch.tensor(np.stack([pad(row, np.ones(len(row), int)) for row in rows]))
    if not left:  # an encoder's prompt ends as in training
        ids[torch.arange(len(rows)), torch.tensor(LENGTHS) - 1] = EOS
    out = {f"{name}.prompts": ids.numpy(), f"{name}.lengths": np.array(LENGTHS)}
    for what, settings in SEARCHES.items():
        if "penalized" in what and left:  # padding counts as read there: one row, without any
            ids_here, mask_here = ids[1:2], mask[1:2]
        else:
            ids_here, mask_here = ids, mask
        for end, eos in {"free": None, "eos": EOS_OF[name], "several": several(name)}.items():
            if end == "several" and (not eos or "penalized" in what):
                continue
            beams = settings.get("num_beams", 1)
            made = model.generate(
                ids_here,
                attention_mask=mask_here,
                max_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=eos,
                bos_token_id=None,
                num_return_sequences=beams,
                output_scores=True,
                return_dict_in_generate=True,
                use_cache=left,  # transformers gives a decoder's cache as many layers as the encoder has
                **settings,
            )
            made_ids = made.sequences[:, 1 if not left else longest :].numpy()
            made_ids = np.pad(made_ids, ((0, 0), (0, NEW - made_ids.shape[1])))
            key = f"{name}.{what}.{end}"
            out[f"{key}.ids"] = made_ids.reshape(len(ids_here), beams, NEW)
            if beams > 1:
                out[f"{key}.scores"] = made.sequences_scores.numpy().reshape(len(ids_here), beams)
    return out


# A token that each family says now and then, so that texts end at different lengths; found by `found_eos`.
EOS_OF: dict[str, int] = {}
# Others that end a text beside it, as of models whose eos_token_id is a list.
OTHERS: dict[str, list[int]] = {}


def several(name: str) -> list[int]:
    """All of a family's ids that end a text; none before they are found."""
    return [EOS_OF[name], *OTHERS[name]] if name in OTHERS else []


def found_eos(name: str) -> int:
    """The most frequent token that no greedy text has twice in a row."""
    EOS_OF[name] = None
    ids = searches(name)[f"{name}.beams 1.free.ids"]
    counts = np.bincount(ids[:, :, 2:8].ravel(), minlength=61)
    counts[0] = 0
    eos, *others = np.argsort(-counts, kind="stable")[:3].tolist()
    OTHERS[name] = others
    return eos


def processed() -> dict[str, np.ndarray]:
    """Logits, and what each processor makes of them."""
    rng = np.random.default_rng(4)
    logits = torch.tensor(rng.normal(0, 3, (4, 200)).astype(np.float32))
    seen = torch.tensor(rng.integers(0, 200, (4, 30)))
    made = {
        "top_k": processors.TopKLogitsWarper(7)(seen, logits),
        "top_p": processors.TopPLogitsWarper(0.8)(seen, logits),
        "min_p": processors.MinPLogitsWarper(0.1)(seen, logits),
        "repetition_penalty": processors.RepetitionPenaltyLogitsProcessor(1.4)(seen, logits),
    }
    all_of_them = processors.LogitsProcessorList(
        [
            processors.RepetitionPenaltyLogitsProcessor(1.4),
            processors.TemperatureLogitsWarper(0.7),
            processors.TopKLogitsWarper(40),
            processors.TopPLogitsWarper(0.9),
            processors.MinPLogitsWarper(0.05),
        ]
    )
    made["all"] = all_of_them(seen, logits)
    return {
        "logits": logits.numpy(),
        "seen": seen.numpy(),
        **{f"processed.{key}": value.numpy() for key, value in made.items()},
    }


out = {"versions": np.array([torch.__version__, transformers.__version__])} | processed()
for name in MODELS:
    EOS_OF[name] = found_eos(name)
    out |= {f"{name}.eos": np.array(EOS_OF[name]), f"{name}.several": np.array(several(name))} | searches(name)
    for what in SEARCHES:
        print(name, what, (out[f"{name}.{what}.eos.ids"] != 0).sum(-1).tolist())
np.savez_compressed(HERE / "generate.npz", **out)
