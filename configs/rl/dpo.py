"""DPO from pairs of a right and a wrong Python function.

    t5like rl --config=configs/rl/dpo.py --workdir=runs/dpo
        --config.init_from.checkpoint=runs/code_sft

The wrong function is the right one of another description. Train `configs/rl/code_sft.py` first.
Hardware: two CPU cores, 1 CPU minute. Held-out accuracy: from 0.471 to 0.986, the means of three seeds
(standard error 0.004); the longer answer is the right one in 46.9 %.
"""

import code_sft
import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = code_sft.get_config()
    config.rl.update(method="dpo", chosen_field="targets", rejected_field="rejected", eval_prompts=1024)
    config.data.batch_size = 32
    config.optimizer.update(learning_rate=2e-4, warmup_steps=5)
    config.train.update(num_steps=100, eval_every=50, checkpoint_every=50)
    config.evaluate.metrics = ()
    return config
