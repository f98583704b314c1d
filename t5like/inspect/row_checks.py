"""Checks that the rows of a batch can teach what their objective says; each finding is a warning in one line.

They know how a decoder reads its targets, and which text is stored, so they find targets that are shifted, padding
that is attended to or carries weight, gaps whose targets are those of another gap, and rows without targets. Called by
`inspect.data`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from t5like.data.objectives.windows import Denoiser, TextWindows
from t5like.data.pipeline import Component
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.data.tokenizers.vocabulary import DECODER_START_ID
from t5like.inspect.rows import real_positions
from t5like.types import Batch

OFFSETS = (0, 2, -1, 3, -2)  # by which targets may be shifted, tried in this order; 1 is right


class Finding(NamedTuple):
    """A finding.

    Attributes:
        name: a word that programs can compare.
        text: one line: what is wrong, with its number, and the remedy.
    """

    name: str
    text: str


def check_rows(
    tokenizer: Tokenizer,
    components: Sequence[Component],
    batch: Batch,
    component_B: np.ndarray,
    text_of: Callable[[np.ndarray, int], TextWindows | None],
) -> list[Finding]:
    """All warnings about some rows.

    Args:
        tokenizer: of the run.
        components: of the config.
        batch: the rows, in numpy.
        component_B: their components.
        text_of: from (indices of rows in `batch`, component) to their stored text; None for supervised examples.
    """
    found = [*_shifted(batch), *_padding(tokenizer, batch), *_without_targets(batch)]
    for component in np.unique(component_B).tolist():
        rows_N = np.flatnonzero(component_B == component)
        part = Batch(*(None if x is None else x[rows_N] for x in batch))
        if (denoiser := components[component].denoiser) and (text := text_of(rows_N, component)):
            found += _restored(tokenizer, denoiser, part, text)
    return found


# ---- The decoder reads its targets, shifted by one ----


def _shifted(batch: Batch) -> list[Finding]:
    """Targets that are not the decoder input shifted by one."""
    if batch.decoder_BL is None:
        return []
    right, pairs = _matches(batch, 1)
    if right == pairs:
        return []
    best = max(OFFSETS, key=lambda offset: _share_of(batch, offset))
    what = f"{pairs - right:,} of {pairs:,} decoder inputs are not the target before them"
    if _share_of(batch, best) > max(0.9, right / pairs):
        what += f": they are the target {_place(best)}"
    return [
        Finding(
            "targets_not_shifted",
            f"the targets are not the decoder input shifted by one: {what}; the decoder input must be START, then the "
            "targets without the last: look at what writes targets_BL and decoder_BL",
        )
    ]


def _place(offset: int) -> str:
    if offset == 0:
        return "of the same position, which the model then only copies"
    return f"{abs(offset)} positions {'before' if offset > 0 else 'after'} them"


def _share_of(batch: Batch, offset: int) -> float:
    matching, pairs = _matches(batch, offset)
    return matching / max(pairs, 1)


def _matches(batch: Batch, offset: int) -> tuple[int, int]:
    """How many decoder inputs are the target `offset` positions before them, of all that could be.

    A pair counts if both positions have weight and lie in one segment; START counts as no pair.
    """
    weighted_BL = batch.weights_BL > 0
    segments_BL = weighted_BL.astype(np.int32) if batch.decoder_segments_BL is None else batch.decoder_segments_BL
    early = slice(max(-offset, 0), batch.targets_BL.shape[1] - max(offset, 0))  # of targets
    late = slice(max(offset, 0), batch.targets_BL.shape[1] - max(-offset, 0))  # of decoder inputs
    earlier = slice(early.start + offset, early.stop + offset)
    assert earlier == late, (earlier, late)
    counted = weighted_BL[:, early] & weighted_BL[:, late] & (segments_BL[:, early] == segments_BL[:, late])
    if offset != 1:
        counted &= batch.decoder_BL[:, late] != DECODER_START_ID
    equal = batch.decoder_BL[:, late] == batch.targets_BL[:, early]
    return int((equal & counted).sum()), int(counted.sum())


# ---- Padding and weights ----


def _padding(tokenizer: Tokenizer, batch: Batch) -> list[Finding]:
    """Padding that carries weight, or that the encoder attends to."""
    found = []
    segments_BL = batch.encoder_segments_BS if batch.decoder_BL is None else batch.decoder_segments_BL
    heavy_BL = batch.weights_BL > 0
    if segments_BL is not None:
        heavy_BL = heavy_BL & (segments_BL == 0)
    elif tokenizer.pads_with_a_token:
        heavy_BL = heavy_BL & (batch.targets_BL == tokenizer.pad_id)
    else:
        heavy_BL = np.zeros_like(heavy_BL)
    if count := int(heavy_BL.sum()):
        share = count / int((batch.weights_BL > 0).sum())
        found.append(
            Finding(
                "padding_has_weight",
                f"padding carries loss weight: {count:,} of the targets with weight are padding ({share:.1%}), so that "
                "the model learns to predict padding; set weights_BL to 0 there",
            )
        )
    if batch.encoder_BS is not None and tokenizer.pads_with_a_token:
        attended_BS = ~real_positions(batch.encoder_BS, None)
        if batch.encoder_segments_BS is not None:
            attended_BS = attended_BS & (batch.encoder_segments_BS > 0)
        if count := int(attended_BS.sum()):
            found.append(
                Finding(
                    "encoder_attends_to_padding",
                    f"the encoder attends to padding: {count:,} of {attended_BS.size:,} positions are padding at the "
                    "end of a row, with a segment above 0 or without segments; write encoder_segments_BS with 0 there",
                )
            )
    return found


def _without_targets(batch: Batch) -> list[Finding]:
    weighted_B = (batch.weights_BL > 0).any(axis=1)
    if weighted_B.all():
        return []
    count = int((~weighted_B).sum())
    return [
        Finding(
            "rows_without_targets",
            f"{count:,} of {len(weighted_B):,} rows have no target with weight, and teach nothing; use longer "
            "data.targets_length, or look at what writes weights_BL",
        )
    ]


# ---- Inputs and targets together are the stored text ----


def _restored(tokenizer: Tokenizer, denoiser: Denoiser, batch: Batch, text: TextWindows) -> list[Finding]:
    """Rows whose inputs and targets do not give their stored text back."""
    restore = _restore_masked if batch.decoder_BL is None else _restore_gaps
    wrong = 0
    for index in range(len(batch.targets_BL)):
        row = Batch(*(None if x is None else x[index] for x in batch))
        stored = text.tokens_BT[index]
        if denoiser.objective == "mlm_nsp":
            stored = stored[text.segments_BT[index] > 0]
        wrong += restore(tokenizer, denoiser, row) != stored.tolist()
    if not wrong:
        return []
    what = "the masked places and their targets" if batch.decoder_BL is None else "inputs and targets"
    return [
        Finding(
            "text_not_restored",
            f"{what} of {wrong:,} of {len(batch.targets_BL):,} rows of {denoiser.name} do not give the stored text "
            f"back: the targets belong to other places; look at {denoiser.objective} in data/objectives",
        )
    ]


def _restore_masked(tokenizer: Tokenizer, denoiser: Denoiser, row: Batch) -> list[int]:
    """The text of an encoder-only row: its tokens, with the targets at the chosen places, without CLS and SEP."""
    ids = np.where(row.weights_BL > 0, row.targets_BL, row.encoder_BS)
    if denoiser.objective == "mlm":
        return ids[1:-1].tolist()
    real, second = row.encoder_segments_BS > 0, row.token_types_BS == 1
    first, second = ids[real & ~second], ids[real & second]
    return [*first[1:-1].tolist(), *second[:-1].tolist()]


def _restore_gaps(tokenizer: Tokenizer, denoiser: Denoiser, row: Batch) -> list[int]:
    """The text of a row with a decoder: the inputs with their gaps filled, or the inputs and then the targets."""
    targets = row.targets_BL[row.weights_BL > 0].tolist()
    if denoiser.objective in ("causal_lm", "prefix_lm") and row.encoder_BS is None:
        return [int(row.decoder_BL[0]), *row.targets_BL.tolist()]
    inputs = (row.decoder_BL if row.encoder_BS is None else row.encoder_BS)[: denoiser.inputs].tolist()
    inputs = inputs[0 if denoiser.mode is None else 1 :]
    if denoiser.objective == "causal_lm":
        return targets
    if denoiser.spans is None or denoiser.spans.targets == denoiser.spans.noise:  # prefix LM, UL2's S
        return [*inputs, *targets]
    sentinels = set(tokenizer.sentinel_ids.tolist())
    spans: list[list[int]] = []
    for token in targets[:-1]:  # without EOS
        if token in sentinels:
            spans.append([token])
        elif spans:
            spans[-1].append(token)
    filled = {span[0]: span[1:] for span in spans}
    return [part for token in inputs[:-1] for part in (filled.get(token, [token]))]
