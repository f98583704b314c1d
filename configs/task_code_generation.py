"""Fine-tuning to write a Python function's body from its signature and the first sentence of its docstring.

    t5like train --config=configs/task_code_generation.py --workdir=RUN --config.init_from.checkpoint=runs/tiny

The task is `data.sources.python_tasks.code_generation`: 3,720 functions of the standard library of Python 3.11,
with one reference each. Nothing is executed: the metrics compare text, and a correct body in other words counts as
wrong.
Its model is that of `tiny`: train `tiny` first, and start from that run.
Hardware: two CPU cores, 502 s of processor time. Held-out results: BLEU 24.3, exact match 5.9 %; untrained 0.6 and
0.0, the input itself 7.3 and 0.0.

With a network, on LBPP's problems without their tests (TFDS has no larger set for training):

    --config.data.source=tfds:lbpp/python:2.0.0 --config.data.split=test
    --config.data.inputs_template='{instruction}' --config.data.targets_template='{completion}'
    --config.data.inputs_length=1024 --config.data.targets_length=1024 --config.evaluate.max_new_tokens=512
"""

import ml_collections
import tiny


def get_config() -> ml_collections.ConfigDict:
    config = tiny.get_config()
    config.data.update(source=("task:code_generation",), objective=("supervised",), heldout_fraction=0.06)
    config.data.update(inputs_length=128, targets_length=128)
    config.optimizer.update(name="adamw_rms", learning_rate=0.03, schedule="cosine", warmup_steps=40)
    config.train.update(num_steps=400, eval_every=200, checkpoint_every=200)
    config.evaluate.update(metrics=("exact_match", "bleu", "chrf"), max_new_tokens=112)
    return config
