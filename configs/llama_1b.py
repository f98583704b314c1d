"""TinyLlama: 1.1 billion parameters (1,100,048,384), rows of 2,048 tokens; hyperparameters of `llama_7b`.

    t5like train --config=configs/llama_1b.py --workdir=RUN --config.data.source='jsonl:my_texts/*.jsonl.zst'

Hardware: 8 accelerators with 16 GB or more. Time and expected loss: not measured.
"""

import llama_7b
import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = llama_7b.get_config()
    config.data.update(targets_length=2048, batch_size=1024)
    config.model.update(num_layers=22, model_dim=2048, num_heads=32, num_kv_heads=4, head_dim=64, mlp_dim=5632)
    config.optimizer.update(learning_rate=4e-4)
    config.train.update(num_steps=1_000_000)
    return config
