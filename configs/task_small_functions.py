"""Fine-tuning to write small Python functions from a description, as a start for `t5like rl` with unit tests.

    t5like train --config=configs/task_small_functions.py --workdir=RUN --config.init_from.checkpoint=runs/tiny

The task is `data.sources.small_functions`: about 7,400 functions of one line for numbers, lists and texts, with five
unit tests each in the field `tests`, which the reward `python_tests` runs. The metrics here compare text.
Its model is that of `tiny`: train `tiny` first, and start from that run.
"""

import ml_collections
import tiny


def get_config() -> ml_collections.ConfigDict:
    config = tiny.get_config()
    config.data.update(source=("task:small_functions",), objective=("supervised",), heldout_fraction=0.05)
    config.data.update(inputs_length=64, targets_length=48)
    config.optimizer.update(learning_rate=0.03, warmup_steps=40)
    config.train.update(num_steps=400, eval_every=200, checkpoint_every=200)
    config.evaluate.update(metrics=("exact_match", "chrf"), max_new_tokens=48)
    return config
