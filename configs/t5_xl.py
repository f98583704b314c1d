"""T5 1.1 xl, 2.8 billion parameters (2,849,757,184 with 32,128 rows); hyperparameters of `t5_small`.

    t5like train --config=configs/t5_xl.py --workdir=RUN --config.data.source='text:my_texts/*.txt'

Hardware: 32 TPU v5e or 16 H100, or more. Time and expected loss: not measured.
"""

import ml_collections
import t5_small


def get_config() -> ml_collections.ConfigDict:
    config = t5_small.get_config()
    config.model.update(num_layers=24, model_dim=2048, num_heads=32, mlp_dim=5120, remat="full")
    return config
