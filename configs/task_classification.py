"""Fine-tuning to classify docstrings by package, of eight packages.

    t5like train --config=configs/task_classification.py --workdir=RUN --config.init_from.checkpoint=runs/tiny

The task is `data.sources.python_tasks.classification`: 2,230 docstrings of the standard library of Python 3.11;
31 % are from tkinter.
Its model is that of `tiny`: train `tiny` first, and start from that run.
Hardware: two CPU cores, 107 s of processor time. Held-out results: accuracy 85.8 %; untrained 12.9 %, always
tkinter 32.9 %.

With a network, on SST-2, whose labels TFDS numbers: 0 negative, 1 positive:

    --config.data.source=tfds:glue/sst2:2.0.0
    --config.data.inputs_template='sst2 sentence: {sentence}' --config.data.targets_template='{label}'
    --config.evaluate.answer_choices=0,1
"""

import ml_collections
import tiny

CHOICES = ("asyncio", "email", "importlib", "logging", "multiprocessing", "tkinter", "unittest", "xml")


def get_config() -> ml_collections.ConfigDict:
    config = tiny.get_config()
    config.data.update(source=("task:classification",), objective=("supervised",), heldout_fraction=0.1)
    config.data.update(inputs_length=128, targets_length=32)
    config.optimizer.update(name="adamw_rms", learning_rate=0.03, schedule="cosine", warmup_steps=15)
    config.train.update(num_steps=150, eval_every=75, checkpoint_every=75)
    config.evaluate.update(metrics=("accuracy",), answer_choices=CHOICES, max_new_tokens=8)
    return config
