"""Fine-tuning to continue a paragraph of documentation from its first sentence.

    t5like train --config=configs/task_text_generation.py --workdir=RUN --config.init_from.checkpoint=runs/tiny

The task is `data.sources.python_tasks.text_generation`: 2,960 paragraphs from docstrings of the standard library
and from the language reference of Python 3.11. Many continuations are correct, but only one is the reference, so the
held-out loss is more informative than the other metrics.
Its model is that of `tiny`: train `tiny` first, and start from that run.
Hardware: two CPU cores, 149 s of processor time. Held-out results: perplexity 69.1, ROUGE-L 12.2; untrained 266 and
2.1. With an earlier preset `tiny`, the perplexity after 250 steps was 262. Repeating the input scores 15.9: a model of
this size learns the style of the continuation, not its content.

With a network, on answers to open instructions (Dolly):

    --config.data.source=tfds:databricks_dolly:1.0.0
    --config.data.inputs_template='{instruction} {context}' --config.data.targets_template='{response}'
    --config.data.inputs_length=512 --config.data.targets_length=256
"""

import ml_collections
import tiny


def get_config() -> ml_collections.ConfigDict:
    config = tiny.get_config()
    config.data.update(source=("task:text_generation",), objective=("supervised",), heldout_fraction=0.08)
    config.data.update(inputs_length=128, targets_length=128)
    config.optimizer.update(name="adamw_rms", learning_rate=0.03, schedule="cosine", warmup_steps=15)
    config.train.update(num_steps=125, eval_every=125, checkpoint_every=125)
    config.evaluate.update(metrics=("rougeL", "chrf"), max_new_tokens=104)
    return config
