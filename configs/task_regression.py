"""An encoder with a regression head: the cyclomatic complexity of a function.

    t5like train --config=configs/task_regression.py --workdir=RUN

X

"""

import ml_collections
import tiny


def get_config() -> ml_collections.ConfigDict:
    config = tiny.get_config()
    config.data.update(source=("task:regression",), objective=("regression",), heldout_fraction=0.1)
    config.data.update(inputs_length=256)
    config.model.update(architecture="encoder", pooling="mean")
    config.optimizer.update(learning_rate=0.03, warmup_steps=15)
    config.train.update(num_steps=60, eval_every=30, checkpoint_every=60)
    config.evaluate.update(metrics=("pearson", "spearman"))
    return config
