"""T5 1.1 xxl, 11 billion parameters (11,135,332,352 with 32,128 rows); hyperparameters of `t5_small`.

    t5like train --config=configs/t5_xxl.py --workdir=RUN --config.data.source='text:my_texts/*.txt'

Hardware: 256 TPU v5e or 64 H100, or more. Time and expected loss: not measured.
"""

import ml_collections
import t5_small


def get_config() -> ml_collections.ConfigDict:
    config = t5_small.get_config()
    config.model.update(num_layers=24, model_dim=4096, num_heads=64, mlp_dim=10240, remat="full")
    return config
