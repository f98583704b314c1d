"""Fine-tuning to translate Python expressions to English, word by word and in the word order of English.

    t5like train --config=configs/task_translation.py --workdir=RUN --config.init_from.checkpoint=runs/tiny

The task is `data.sources.python_tasks.translation`: 8,000 expressions of the standard library. This task needs no
download of a parallel corpus. A rule gives the one correct translation, which depends on the structure of the
expression.
Its model is that of `tiny`: train `tiny` first, and start from that run.
Hardware: two CPU cores, 319 s of processor time. Held-out results: BLEU 89.0, exact match 67.6 %; untrained 0.4 and
0.0, the input itself 10.7 and 0.0.

With a network, from German to English (WMT 2016) or from Portuguese (TED talks):

    --config.data.source=tfds:wmt16_translate/de-en:1.0.0 --config.data.targets_template='{en}'
    --config.data.inputs_template='translate German to English: {de}'
    --config.data.source=tfds:ted_hrlr_translate/pt_to_en:1.0.0 --config.data.targets_template='{en}'
    --config.data.inputs_template='translate Portuguese to English: {pt}'
"""

import ml_collections
import tiny


def get_config() -> ml_collections.ConfigDict:
    config = tiny.get_config()
    config.data.update(source=("task:translation",), objective=("supervised",), heldout_fraction=0.05)
    config.data.update(inputs_length=64, targets_length=112)
    config.optimizer.update(name="adamw_rms", learning_rate=0.03, schedule="cosine", warmup_steps=40)
    config.train.update(num_steps=400, eval_every=200, checkpoint_every=200)
    config.evaluate.update(metrics=("bleu", "chrf", "exact_match"), max_new_tokens=64)
    return config
