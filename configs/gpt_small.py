"""GPT-2 small: decoder-only, 124 million parameters (124,439,808 with 50,257 rows), rows of 1,024 tokens.

    t5like train --config=configs/gpt_small.py --workdir=RUN --config.data.source='text:my_texts/*.txt'

Recipe: Radford et al. 2019 for the model; AdamW, cosine, half a million tokens per step as in nanoGPT.
Hardware: one accelerator with 16 GB or more, with train.microbatches large enough for its memory. Time and expected
loss: not measured; nanoGPT reports 2.85 nats on OpenWebText after 600,000 steps.
"""

import ml_collections

from t5like.config import schema


def get_config() -> ml_collections.ConfigDict:
    config = schema.default()
    config.tokenizer.update(vocab_size=50_257, num_sentinels=0, model_type="bpe")
    config.data.update(objective="causal_lm", inputs_length=0, targets_length=1024, batch_size=512)
    config.data.source = ("tfds:c4/en:3.1.0",)
    config.data.heldout_fraction = 0.001
    config.model.update(
        architecture="decoder",
        num_layers=12,
        model_dim=768,
        num_heads=12,
        head_dim=64,
        mlp_dim=3072,
        mlp="gelu",
        positions="learned",
        max_length=1024,
        norm="layer",
        norm_epsilon=1e-5,
        biases=True,
        tied_embeddings=True,
        scale_attention=True,
        init="gpt2",
    )
    config.optimizer.update(
        name="adamw",
        learning_rate=6e-4,
        schedule="cosine",
        final_fraction=0.1,
        warmup_steps=2_000,
        b2=0.95,
        weight_decay=0.1,
    )
    config.train.update(num_steps=600_000, z_loss=0.0, log_every=100, eval_every=5_000, checkpoint_every=5_000)
    config.mesh.update(data=1, fsdp=-1)
    return config
