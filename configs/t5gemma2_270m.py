"""T5Gemma 2 270M-270M (text): 369 million parameters, UL2, rows of 2,048 input tokens.

    t5like train --config=configs/t5gemma2_270m.py --workdir=RUN --config.data.source='jsonl:my_texts/*.jsonl.zst'

Shape: Zhang et al. 2025 (T5Gemma 2, arXiv:2512.14856), two stacks of Gemma 3 270M's size, without its images. Hardware:
8 accelerators with 16 GB or more. Time and expected loss: not measured.
"""

import ml_collections
import t5gemma_2b


def get_config() -> ml_collections.ConfigDict:
    config = t5gemma_2b.get_config()
    config.tokenizer.update(vocab_size=262_144, num_sentinels=384)
    config.data.update(objective="ul2", inputs_length=2048, targets_length=1152, batch_size=512)
    config.model.update(
        num_layers=18,
        model_dim=640,
        num_heads=4,
        num_kv_heads=1,
        mlp_dim=2048,
        qk_norm=True,
        attention_window=512,
        encoder_window=256,  # half of the window on each side, as in T5Gemma 2
        encoder_window_ahead=257,
        layer_pattern=("local",) * 5 + ("global",),
        attention_softcap=0.0,
        logits_softcap=0.0,
        merged_attention=True,
        separate_embeddings=False,
        remat="none",
    )
    config.model.rotary.update(base=1_000_000.0, local_base=10_000.0)
    config.optimizer.update(learning_rate=1e-3)
    return config
