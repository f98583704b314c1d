"""An encoder with a head for labels: docstrings by package, of eight packages.

    t5like train --config=configs/task_encoder_classification.py --workdir=RUN --config.init_from.checkpoint=runs/tiny \
        --config.init_from.adapt=architecture

The task is that of `task_classification`, whose model generates the name of the package. The encoder is that of
`tiny`: train `tiny` first.
Hardware: two CPU cores, 46 s of processor time. Held-out results: accuracy 89.6 %, macro F1 84.9 %, Matthews
correlation 87.3 %; always tkinter: accuracy 32.9 %.

With a network, on CoLA: --config.data.source=tfds:glue/cola:2.0.0 --config.data.inputs_template='{sentence}'
--config.data.targets_template='{label}' --config.data.labels=unacceptable,acceptable
"""

import ml_collections
import tiny

LABELS = ("asyncio", "email", "importlib", "logging", "multiprocessing", "tkinter", "unittest", "xml")


def get_config() -> ml_collections.ConfigDict:
    config = tiny.get_config()
    config.data.update(source=("task:classification",), objective=("classification",), heldout_fraction=0.1)
    config.data.update(labels=LABELS, inputs_length=128)
    config.model.update(architecture="encoder", pooling="mean")
    config.optimizer.warmup_steps = 15
    config.train.update(num_steps=60, eval_every=30, checkpoint_every=60)
    config.evaluate.update(metrics=("accuracy", "macro_f1", "matthews"))
    return config
