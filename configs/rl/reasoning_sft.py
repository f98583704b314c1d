"""Fine-tuning on a task of reasoning-gym, spelling words backward, as a start for `configs/rl/reasoning.py`.

    t5like train --config=configs/rl/reasoning_sft.py --workdir=runs/reasoning_sft

The words have three or four letters. The model has 0.4 million parameters and starts from random weights. It needs
`pip install 't5like[rl]'`.
Hardware: two CPU cores. Held-out result: exact match 56.6 %.
"""

import ml_collections

from t5like.config import schema


def get_config() -> ml_collections.ConfigDict:
    config = schema.default()
    config.tokenizer.update(vocab_size=400, num_sentinels=4, model_type="bpe", character_coverage=1.0)
    config.data.update(
        source=("reasoning_gym:spell_backward?size=8000&max_word_len=4",),
        objective=("supervised",),
        heldout_fraction=0.06,
    )
    config.data.update(inputs_length=32, targets_length=8, batch_size=64, packing=False)
    config.model.update(num_layers=2, model_dim=64, num_heads=2, head_dim=32, mlp_dim=256)
    config.optimizer.update(name="adamw", learning_rate=2e-3, schedule="constant", warmup_steps=20)
    config.train.update(num_steps=400, eval_every=100, checkpoint_every=100, early_evals=0)
    config.evaluate.update(metrics=("exact_match",), max_new_tokens=8)
    return config
