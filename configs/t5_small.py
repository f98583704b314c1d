"""T5 1.1 small, 77 million parameters (76,961,152 with 32,128 rows), on C4 as published.

    t5like train --config=configs/t5_small.py --workdir=RUN --config.data.source='text:my_texts/*.txt'

Recipe: Raffel et al. 2020 and T5X's `t5_1_1` pretraining: Adafactor, inverse square root schedule, 2,048 rows of 512
tokens, no dropout. Hardware: one accelerator with 16 GB or more; adapt data.batch_size to its memory.
Time and expected loss: not measured. For base, nanoT5 (Nawrot 2023) reports 1.95 to 2.04 nats after 2^16 steps of
128 rows.
"""

import ml_collections

from t5like.config import schema


def get_config() -> ml_collections.ConfigDict:
    config = schema.default()
    config.data.source = ("tfds:c4/en:3.1.0",)
    config.data.batch_size = 2048
    config.data.heldout_fraction = 0.001
    config.model.update(num_layers=8, model_dim=512, num_heads=6, head_dim=64, mlp_dim=1024)
    config.optimizer.update(name="adafactor", learning_rate=0.01, schedule="rsqrt", warmup_steps=10_000)
    config.train.update(num_steps=1_000_000, log_every=100, eval_every=10_000, checkpoint_every=5_000)
    config.mesh.update(data=1, fsdp=-1)
    return config
