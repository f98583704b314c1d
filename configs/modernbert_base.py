"""ModernBERT base: an encoder for masked language modelling, with local and global layers.

149,656,000 parameters: 149,655,232 as released, and 768 of a norm that the first layer does not use.

    t5like train --config=configs/modernbert_base.py --workdir=RUN --config.data.source='text:my_texts/*.txt'

Sizes, optimizer and learning rate: Warner et al. 2024 (arXiv:2412.13663). Falling share of masked tokens, 30, 15 and
5 % in 77, 20 and 3 % of the steps: Marone et al. 2025 (mmBERT, arXiv:2509.06888); ModernBERT itself masks 30 %.
Differences from ModernBERT: the batch size is constant from the start, the decay of the learning rate is linear, the
global layers have the rotary base 160,000 from the start (ModernBERT: when it is extended to 8,192 tokens), there is no
dropout, and the tokenizer is SentencePiece. Its own is used with `tokenizer.path=DIR/tokenizer.json`.
Hardware: 8 accelerators with 16 GB (`t5like plan --quick`), or fewer with more `train.microbatches`.
Time and expected loss: not measured.
"""

import ml_collections

from t5like.config import schema

NUM_STEPS = 364_000  # of 4,608 rows of 1,024 tokens: 1.7 trillion tokens
LOWER_MASKS = (280_000, 352_000)


def get_config() -> ml_collections.ConfigDict:
    config = schema.default()
    config.tokenizer.update(vocab_size=50_368)
    config.data.update(objective="mlm", inputs_length=1024, batch_size=4608, cross_document_attention=False)
    config.data.update(phase_boundaries=LOWER_MASKS, phase_noise_density=(0.3, 0.15, 0.05), noise_density=0.15)
    config.data.source = ("tfds:c4/en:3.1.0",)
    config.data.heldout_fraction = 0.001
    config.model.update(
        architecture="encoder",
        num_layers=22,
        model_dim=768,
        num_heads=12,
        head_dim=64,
        mlp_dim=1152,
        mlp="gated_gelu_exact",
        positions="rotary",
        attention_window=65,  # 64 tokens on each side
        layer_pattern=(("global", "local", "local") * 8)[:22],
        norm="layer",
        norm_bias=False,
        norm_epsilon=1e-5,
        embedding_norm=True,
        first_attention_norm=False,
        head="mlm",
        tied_embeddings=True,
        scale_attention=True,
        init="gpt2",
    )
    config.model.rotary.update(base=160_000.0, local_base=10_000.0)
    config.optimizer.update(
        name="stable_adamw",
        learning_rate=8e-4,
        schedule="wsd",
        warmup_steps=640,  # 3 billion tokens
        decay_steps=NUM_STEPS - LOWER_MASKS[-1],
        b2=0.98,
        epsilon=1e-6,
        weight_decay=1e-5,
        clip_norm=0.0,
    )
    config.train.update(
        num_steps=NUM_STEPS, microbatches=32, z_loss=0.0, log_every=100, eval_every=4000, checkpoint_every=4000
    )
    config.mesh.update(data=1, fsdp=-1)
    return config
