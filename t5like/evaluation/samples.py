"""Samples that a run shows at its end: held-out passages, what the model was given, and what it makes of them.

Called by `train`, which prints them and writes them to samples.txt.
"""

import jax
import numpy as np

from t5like.data.objectives.masking import MASK
from t5like.data.pipeline import Batches
from t5like.data.sources.names import source_names
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.data.tokenizers.vocabulary import DECODER_START_ID
from t5like.evaluation.task_eval import EvalExample
from t5like.inference.generate import Generator
from t5like.inference.infilling import fill, spans
from t5like.inference.prompt_format import Prompt
from t5like.types import Batch

SAMPLES = 3  # held-out passages shown at the end; at least one of each source


def samples(generator: Generator, heldout: Batches, mesh: jax.sharding.Mesh) -> str:
    """Passages from all over the held-out text: what the model was given, what stood there, and what it says.

    Of several sources each has its share, and its name stands above its passages.
    """
    config, tokenizer = generator.config, generator.tokenizer
    titles, batches = [], []
    for name, number in chosen_rows(heldout):
        index, row = divmod(number, config.data.batch_size)
        batches.append(jax.tree.map(lambda x, row=row: x[row : row + 1], heldout.at(index)))
        titles.append(f"held-out passage {len(batches)}" + (f", {name}" if len(config.data.source) > 1 else ""))
    with jax.set_mesh(mesh):
        if config.model.architecture == "encoder":
            said = [generator.predict_tokens(batch) for batch in batches]
            return "\n".join(show_masked(tokenizer, *each) for each in zip(titles, batches, said, strict=True))
        asked = [
            (title, found) for title, batch in zip(titles, batches, strict=True) if (found := passage(batch)).answer
        ]
        if not asked:
            return ""
        prompts, longest = [found.prompt for _, found in asked], max(len(found.answer) for _, found in asked)
        ids_BL = generator.ids(prompts, max_new_tokens=min(longest, generator.max_new_tokens(prompts)))
    blocks = []
    for (title, found), ids_L in zip(asked, ids_BL, strict=True):
        given, truth = (tokenizer.decode(ids) for ids in (found.read, found.answer))
        blocks.append(show(title, given, truth, *generator.texts([ids_L[: len(found.answer)]])))
    return "\n".join(blocks)


def chosen_rows(heldout: Batches) -> list[tuple[str, int]]:
    """The source's name and the number of each held-out row that is shown: of each source some, far apart."""
    rows_of = {
        name: rows
        for source, name in enumerate(source_names(heldout.config.data))
        if len(rows := heldout.heldout_rows(source))
    }
    each = -(-SAMPLES // len(rows_of))
    return [
        (name, int(rows[number * len(rows) // count]))
        for name, rows in rows_of.items()
        for count in [min(each, len(rows))]
        for number in range(count)
    ]


def passage(batch: Batch) -> EvalExample:
    """What the first text of a batch's first row asks, and what should follow.

    A text of which all is learned is asked to go on after three quarters.
    """
    batch = jax.tree.map(lambda x: x[0], batch)
    learned_L = batch.weights_BL > 0
    mine_L = np.ones(len(learned_L), bool)
    if batch.decoder_segments_BL is not None:
        mine_L = batch.decoder_segments_BL == batch.decoder_segments_BL[learned_L.argmax()]
    learned_L = learned_L & mine_L
    targets = batch.targets_BL[learned_L].tolist()
    if batch.encoder_BS is not None:
        read_S = np.ones(len(batch.encoder_BS), bool)
        if batch.encoder_segments_BS is not None:
            read_S = batch.encoder_segments_BS == batch.decoder_segments_BL[learned_L.argmax()]
        read = batch.encoder_BS[read_S].tolist()
        return EvalExample(Prompt(read), read, targets)
    row, first = batch.decoder_BL[mine_L].tolist(), int(mine_L.argmax())
    prefix = 0 if batch.prefix_BL is None else int(batch.prefix_BL[mine_L].sum())
    begin = int(learned_L.argmax()) - first  # place of the first target that is learned
    if not prefix and learned_L.sum() >= len(row) - 1:
        cut = len(row) * 3 // 4
        return EvalExample(Prompt(row[:cut]), row[:cut], targets[cut - 1 - begin :])
    stop = begin + int((~np.append(learned_L[first + begin :], False)).argmax())  # of the first stretch
    answer = batch.targets_BL[mine_L][begin:stop].tolist()
    read = [token for token in row[: begin + 1] if token != DECODER_START_ID]
    return EvalExample(Prompt(row[: begin + 1], prefix), read, answer)


def show(title: str, given: str, truth: str, said: str) -> str:
    """One passage as text; span corruption shows each gap with the truth and the model's filling."""
    gaps = spans(truth)
    if not gaps:
        return f"---- {title} ----\n{given}\n  truth  {truth!r}\n  model  {said!r}\n"
    filled = spans(said)
    lines = [f"  {gap}  truth {text!r}  model {filled.get(gap, '')!r}" for gap, text in gaps.items()]
    return f"---- {title} ----\n{given}\n" + "\n".join(lines) + f"\n  filled  {fill(given, said)!r}\n"


def show_masked(tokenizer: Tokenizer, title: str, batch: Batch, said_BS: np.ndarray) -> str:
    """One passage of an encoder-only model: each masked token with the truth and the model's guess."""
    ids, targets, said = batch.encoder_BS[0], batch.targets_BL[0], said_BS[0]
    if batch.encoder_segments_BS is not None:
        ids = ids[batch.encoder_segments_BS[0] > 0]
    lines = [
        f"  masked  truth {tokenizer.decode([targets[place]])!r}  model {tokenizer.decode([said[place]])!r}\n"
        for place in np.flatnonzero((batch.weights_BL[0] > 0)[: len(ids)])
        if ids[place] == tokenizer.sentinel_ids[MASK]
    ]
    return f"---- {title} ----\n{tokenizer.decode(ids)}\n" + "".join(lines)
