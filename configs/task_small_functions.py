"""Writing small Python functions from a description: a start for training by the reward `python_tests`.

    t5like train --config=configs/task_small_functions.py --workdir=RUN

The task is `data.sources.small_functions`: 7,426 functions of one line for numbers, lists and texts, with five unit
tests each in the field `tests`. The metrics here compare text. The model is that of `tiny` with a smaller vocabulary,
and starts from random weights: those of T5, without patterns, as when its results were measured.
Hardware: two CPU cores. Held-out results: exact match 74.2 %, chrF 96.2; untrained 0.0 and 4.9.
"""

import ml_collections
import tiny


def get_config() -> ml_collections.ConfigDict:
    config = tiny.get_config()
    config.data.update(source=("task:small_functions",), objective=("supervised",), heldout_fraction=0.05)
    config.tokenizer.vocab_size = 512
    config.model.update(init="t5", attention_init="random")
    config.data.update(inputs_length=64, targets_length=48)
    config.optimizer.update(name="adamw_rms", learning_rate=0.03, schedule="cosine", warmup_steps=40)
    config.train.update(num_steps=400, eval_every=200, checkpoint_every=200)
    config.evaluate.update(metrics=("exact_match", "chrf"), max_new_tokens=48)
    return config
