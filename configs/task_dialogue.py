"""Fine-tuning on conversations: a user asks three questions about a function, an assistant answers.

    t5like train --config=configs/task_dialogue.py --workdir=RUN --config.init_from.checkpoint=runs/tiny

The task is `data.sources.python_tasks.dialogue`: 3,791 conversations, built from docstrings and signatures of the
standard library of Python 3.11. The inputs of each example are all turns before the answer.
Its model is that of `tiny`: train `tiny` first, and start from that run.
Hardware: two CPU cores, 430 s of processor time. Held-out results: exact match 55.1 %, F1 60.9; untrained 0.0 and 0.5,
the most frequent answer 17.2 and 17.2.

With a network, on the first question and answer of WikiDialog's conversations (TFDS has no conversations with roles;
for your own, as JSON lines, use --config.data.source=jsonl:GLOB --config.data.messages_field=messages):

    --config.data.source=tfds:wiki_dialog/OQ:1.0.0 --config.data.messages_field=
    --config.data.inputs_template='user: {utterances/1}' --config.data.targets_template='{utterances/2}'
"""

import ml_collections
import tiny


def get_config() -> ml_collections.ConfigDict:
    config = tiny.get_config()
    config.data.update(source=("task:dialogue",), objective=("supervised",), heldout_fraction=0.05)
    config.data.update(inputs_length=192, targets_length=96)
    config.data.messages_field = "messages"
    config.optimizer.update(name="adamw_rms", learning_rate=0.03, schedule="cosine", warmup_steps=35)
    config.train.update(num_steps=350, eval_every=175, checkpoint_every=175)
    config.evaluate.update(metrics=("exact_match", "f1"), max_new_tokens=64)
    return config
