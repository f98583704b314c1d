"""An encoder that labels tokens: what each name in a Python expression is.

    t5like train --config=configs/task_token_classification.py --workdir=RUN

X

"""

import ml_collections
import tiny

LABELS = ("O", "B-CALL", "I-CALL", "B-VALUE", "I-VALUE", "B-KEYWORD", "B-LITERAL")


def get_config() -> ml_collections.ConfigDict:
    config = tiny.get_config()
    config.data.update(source=("task:token_classification",), objective=("token_classification",), heldout_fraction=0.1)
    config.data.update(labels=LABELS, inputs_length=128)
    config.model.update(architecture="encoder")
    config.optimizer.update(learning_rate=0.03, warmup_steps=15)
    config.train.update(num_steps=100, eval_every=50, checkpoint_every=100)
    config.evaluate.update(metrics=("accuracy", "macro_f1", "entity_f1"))
    return config
