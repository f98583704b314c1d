"""Samples that a run shows at its end: held-out passages as prompts, their targets, and the model's predictions.

Called by `train.loop`, which prints them and writes them to samples.txt.
"""

from functools import partial

import jax
import numpy as np

from t5like.data.objectives.masking import MASK
from t5like.data.pipeline import Batches
from t5like.data.sources.names import source_names
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.data.tokenizers.vocabulary import DECODER_START_ID
from t5like.evaluation.label_eval import show_labelled
from t5like.evaluation.task_eval import EvalExample
from t5like.inference.generate import Generator
from t5like.inference.infilling import fill, spans
from t5like.inference.prompt_format import Prompt
from t5like.types import Batch

SAMPLES = 3  # held-out passages; at least one of each source


def samples(generator: Generator, heldout: Batches, mesh: jax.sharding.Mesh) -> str:
    """Passages from all parts of the held-out text: the prompt, the target and the model's prediction.

    Each source has its share of the passages; with several sources the title of a passage names its source.
    """
    config, tokenizer = generator.config, generator.tokenizer
    titles, batches = [], []
    for source, number in sample_rows(heldout):
        index, row = divmod(number, config.data.batch_size)
        batches.append(jax.tree.map(lambda x, row=row: x[row : row + 1], heldout.at(index)))
        titles.append(f"held-out passage {len(batches)}" + (f", {source}" if len(config.data.source) > 1 else ""))
    with jax.set_mesh(mesh):
        if config.data.label_objective:
            show_one = partial(show_labelled, config, tokenizer, params=generator.params)
            return "\n".join(show_one(*each) for each in zip(titles, batches, strict=True))
        if config.model.architecture == "encoder":
            predictions = [generator.predict_tokens(batch) for batch in batches]
            return "\n".join(show_masked(tokenizer, *each) for each in zip(titles, batches, predictions, strict=True))
        examples = [
            (title, example)
            for title, batch in zip(titles, batches, strict=True)
            if (example := first_example(batch)).target
        ]
        if not examples:
            return ""
        prompts = [example.prompt for _, example in examples]
        longest = max(len(example.target) for _, example in examples)
        ids_BL = generator.ids(prompts, max_new_tokens=min(longest, generator.max_new_tokens(prompts)))
    blocks = []
    for (title, example), ids_L in zip(examples, ids_BL, strict=True):
        inputs, target = tokenizer.decode(example.inputs), tokenizer.decode(example.target)
        [prediction] = generator.texts([ids_L[: len(example.target)]])
        blocks.append(show(title, inputs, target, prediction))
    return "\n".join(blocks)


def sample_rows(heldout: Batches) -> list[tuple[str, int]]:
    """The held-out rows that are shown, as source name and row number: some of each source, evenly spaced."""
    rows_of = {
        name: rows
        for source, name in enumerate(source_names(heldout.config.data))
        if len(rows := heldout.heldout_rows(source))
    }
    per_source = -(-SAMPLES // len(rows_of))
    return [
        (name, int(rows[number * len(rows) // count]))
        for name, rows in rows_of.items()
        for count in [min(per_source, len(rows))]
        for number in range(count)
    ]


def first_example(batch: Batch) -> EvalExample:
    """The prompt and target of the first text in a batch's first row.

    If all tokens of a text are targets (causal LM), its first three quarters are the prompt.
    """
    batch = jax.tree.map(lambda x: x[0], batch)
    is_target_L = batch.weights_BL > 0
    in_text_L = np.ones(len(is_target_L), bool)
    if batch.decoder_segments_BL is not None:
        in_text_L = batch.decoder_segments_BL == batch.decoder_segments_BL[is_target_L.argmax()]
    is_target_L = is_target_L & in_text_L
    targets = batch.targets_BL[is_target_L].tolist()
    if batch.encoder_BS is not None:
        in_text_S = np.ones(len(batch.encoder_BS), bool)
        if batch.encoder_segments_BS is not None:
            in_text_S = batch.encoder_segments_BS == batch.decoder_segments_BL[is_target_L.argmax()]
        inputs = batch.encoder_BS[in_text_S].tolist()
        return EvalExample(Prompt(inputs), inputs, targets)
    row, first = batch.decoder_BL[in_text_L].tolist(), int(in_text_L.argmax())
    prefix = 0 if batch.prefix_BL is None else int(batch.prefix_BL[in_text_L].sum())
    begin = int(is_target_L.argmax()) - first  # index in `row` of the first target
    if not prefix and is_target_L.sum() >= len(row) - 1:
        cut = len(row) * 3 // 4
        return EvalExample(Prompt(row[:cut]), row[:cut], targets[cut - 1 - begin :])
    stop = begin + int((~np.append(is_target_L[first + begin :], False)).argmax())  # end of the first run of targets
    target = batch.targets_BL[in_text_L][begin:stop].tolist()
    inputs = [token for token in row[: begin + 1] if token != DECODER_START_ID]
    return EvalExample(Prompt(row[: begin + 1], prefix), inputs, target)


def show(title: str, inputs: str, target: str, prediction: str) -> str:
    """One passage as text; for span corruption, each sentinel with its target span and the predicted span."""
    target_spans = spans(target)
    if not target_spans:
        return f"---- {title} ----\n{inputs}\n  truth  {target!r}\n  model  {prediction!r}\n"
    predicted_spans = spans(prediction)
    lines = [
        f"  {name}  truth {text!r}  model {predicted_spans.get(name, '')!r}" for name, text in target_spans.items()
    ]
    return f"---- {title} ----\n{inputs}\n" + "\n".join(lines) + f"\n  filled  {fill(inputs, prediction)!r}\n"


def show_masked(tokenizer: Tokenizer, title: str, batch: Batch, predicted_BS: np.ndarray) -> str:
    """One passage of an encoder-only model: each masked token with its target and the predicted token."""
    ids, targets, predicted = batch.encoder_BS[0], batch.targets_BL[0], predicted_BS[0]
    if batch.encoder_segments_BS is not None:
        ids = ids[batch.encoder_segments_BS[0] > 0]
    lines = [
        f"  masked  truth {tokenizer.decode([targets[index]])!r}  model {tokenizer.decode([predicted[index]])!r}\n"
        for index in np.flatnonzero((batch.weights_BL[0] > 0)[: len(ids)])
        if ids[index] == tokenizer.sentinel_ids[MASK]
    ]
    return f"---- {title} ----\n{tokenizer.decode(ids)}\n" + "".join(lines)
