"""T5 1.1 large, 783 million parameters (783,150,080 with 32,128 rows); hyperparameters of `t5_small`.

    t5like train --config=configs/t5_large.py --workdir=RUN --config.data.source='text:my_texts/*.txt'

Hardware: 8 accelerators with 16 GB or more. Time and expected loss: not measured.
"""

import ml_collections
import t5_small


def get_config() -> ml_collections.ConfigDict:
    config = t5_small.get_config()
    config.model.update(num_layers=24, model_dim=1024, num_heads=16, mlp_dim=2816, remat="full")
    return config
