"""T5 1.1 base, 248 million parameters (247,577,856 with 32,128 rows); hyperparameters of `t5_small`.

    t5like train --config=configs/t5_base.py --workdir=RUN --config.data.source='text:my_texts/*.txt'

Hardware: one accelerator with 40 GB, or several. Time and expected loss: not measured.
"""

import ml_collections
import t5_small


def get_config() -> ml_collections.ConfigDict:
    config = t5_small.get_config()
    config.model.update(num_layers=12, model_dim=768, num_heads=12, mlp_dim=2048)
    return config
