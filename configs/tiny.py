"""A small T5 1.1 on the running Python's standard library: a few minutes on two CPU cores. `make train` runs it.

t5like train --config=configs/tiny.py --workdir=runs/tiny
"""

import ml_collections

from t5like.config import schema


def get_config() -> ml_collections.ConfigDict:
    config = schema.default()
    config.tokenizer.vocab_size = 4096
    config.data.heldout_fraction = 0.03
    config.data.batch_size = 32
    config.data.inputs_length = 128
    config.data.targets_length = 29
    config.model.num_layers = 2
    config.model.model_dim = 128
    config.model.num_heads = 4
    config.model.head_dim = 32
    config.model.mlp_dim = 256
    config.model.init = "gpt2"
    config.model.attention_init = "local"
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.005
    config.optimizer.adam_factor = 4.0
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 100
    config.train.num_steps = 900
    config.train.eval_every = 300
    config.train.checkpoint_every = 300
    return config
