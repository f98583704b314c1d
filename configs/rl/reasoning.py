"""Training by the scorer of reasoning-gym's task `spell_backward`.

    t5like rl --config=configs/rl/reasoning.py --workdir=runs/reasoning
        --config.init_from.checkpoint=runs/reasoning_sft

The scorer gives 1 for the right word, and less for words with some letters in the right place. Train
`configs/rl/reasoning_sft.py` first.
Hardware: two CPU cores, 2 CPU minutes. Held-out reward: from 0.742 to 0.869, the mean of three seeds (standard error
0.016).
"""

import ml_collections
import reasoning_sft


def get_config() -> ml_collections.ConfigDict:
    config = reasoning_sft.get_config()
    config.rl.update(
        method="policy", rewards=("reasoning_gym:spell_backward",), answers_per_prompt=16, eval_prompts=256
    )
    config.data.batch_size = 64
    config.optimizer.update(learning_rate=3e-4, warmup_steps=5)
    config.train.update(num_steps=90, eval_every=30, checkpoint_every=30)
    config.evaluate.metrics = ()
    return config
