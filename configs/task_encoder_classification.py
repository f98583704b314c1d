"""An encoder with a classification head: docstrings by package, of eight packages.

    t5like train --config=configs/task_encoder_classification.py --workdir=RUN

The task is that of `task_classification`, which generates the label. The encoder is that of `tiny` and starts from
random weights; from those of a run of `tiny`, with its tokenizer:

    --config.init_from.checkpoint=runs/tiny --config.init_from.adapt=architecture --config.tokenizer.vocab_size=4096

"""

import ml_collections
import tiny

LABELS = ("asyncio", "email", "importlib", "logging", "multiprocessing", "tkinter", "unittest", "xml")


def get_config() -> ml_collections.ConfigDict:
    config = tiny.get_config()
    config.data.update(source=("task:classification",), objective=("classification",), heldout_fraction=0.1)
    config.data.update(labels=LABELS, inputs_length=128)
    config.model.update(architecture="encoder", pooling="mean")
    config.optimizer.update(learning_rate=0.03, warmup_steps=15)
    config.train.update(num_steps=60, eval_every=30, checkpoint_every=60)
    config.evaluate.update(metrics=("accuracy", "macro_f1", "matthews"))
    return config
