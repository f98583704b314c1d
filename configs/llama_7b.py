"""Llama 2 7B: decoder-only, 6.7 billion parameters (6,738,415,616), rows of 4,096 tokens.

    t5like train --config=configs/llama_7b.py --workdir=RUN --config.data.source='jsonl:my_texts/*.jsonl.zst'

Recipe: Touvron et al. 2023 (Llama 2), section 2.2: AdamW, cosine schedule to a tenth, 4 million tokens per
step, 2 trillion tokens in total. Hardware: 256 TPU v5e or 64 H100, or more. Time and expected loss: not measured.
"""

import ml_collections

from t5like.config import schema


def get_config() -> ml_collections.ConfigDict:
    config = schema.default()
    config.tokenizer.update(vocab_size=32_000, num_sentinels=0, model_type="bpe")
    config.data.update(objective="causal_lm", inputs_length=0, targets_length=4096, batch_size=1024)
    config.data.source = ("tfds:c4/en:3.1.0",)
    config.data.heldout_fraction = 0.001
    config.model.update(
        architecture="decoder",
        num_layers=32,
        model_dim=4096,
        num_heads=32,
        head_dim=128,
        mlp_dim=11_008,
        mlp="gated_silu",
        positions="rotary",
        norm="rms",
        norm_epsilon=1e-5,
        scale_attention=True,
        init="gpt2",
        remat="full",
    )
    config.optimizer.update(
        name="adamw",
        learning_rate=3e-4,
        schedule="cosine",
        final_fraction=0.1,
        warmup_steps=2_000,
        b2=0.95,
        epsilon=1e-5,
        weight_decay=0.1,
    )
    config.train.update(num_steps=500_000, log_every=10, eval_every=2_000, checkpoint_every=1_000)
    config.mesh.update(data=1, fsdp=-1)
    return config
