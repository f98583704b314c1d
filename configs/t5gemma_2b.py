"""T5Gemma 2B-2B: two stacks of Gemma 2 2B's size, rows of 4,096 + 4,096 tokens.

    t5like train --config=configs/t5gemma_2b.py --workdir=RUN --config.data.source='jsonl:my_texts/*.jsonl.zst'

Shape: Zhang et al. 2025 (T5Gemma, arXiv:2504.06225), google/t5gemma-2b-2b-prefixlm. Hardware: 64 TPU v5e or 32 H100, or
more. Time and expected loss: not measured.
"""

import ml_collections

from t5like.config import schema


def get_config() -> ml_collections.ConfigDict:
    config = schema.default()
    config.tokenizer.update(vocab_size=256_000, num_sentinels=100)
    config.data.update(objective="prefix_lm", inputs_length=4096, targets_length=4096, batch_size=1024)
    config.data.source = ("tfds:c4/en:3.1.0",)
    config.data.heldout_fraction = 0.001
    config.model.update(
        architecture="encoder_decoder",
        num_layers=26,
        model_dim=2304,
        num_heads=8,
        num_kv_heads=4,
        head_dim=256,
        mlp_dim=9216,
        mlp="gated_gelu",
        positions="rotary",
        norm="rms",
        norm_position="sandwich",
        norm_offset=True,
        norm_epsilon=1e-6,
        scale_attention=True,
        attention_window=4096,
        layer_pattern=("local", "global"),
        attention_softcap=50.0,
        logits_softcap=30.0,
        embedding_scale="sqrt_dim",
        separate_embeddings=True,
        tied_embeddings=True,
        logits_scale="none",
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
        weight_decay=0.1,
    )
    config.train.update(num_steps=100_000, loss_chunk=512, log_every=10, eval_every=2_000, checkpoint_every=1_000)
    config.mesh.update(data=1, fsdp=-1)
    return config
