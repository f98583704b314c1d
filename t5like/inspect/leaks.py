"""Does the model read what it must not? Ids that it must not read are changed, and nothing else may change.

Padding: its ids are replaced; the values at all other positions must stay. Future: the decoder's last ids are replaced;
the values before them must stay. The values of the layers are compared one by one, so that the first one that changes
is named. The same program computes both, so that they must be bitwise equal. Called by `overfit`.
"""

import jax
import numpy as np

from t5like.inspect.step_tensors import Programs, Step
from t5like.types import Array, Batch


def check(prepared: Step, rows: Batch) -> list[str]:
    """Lines about what was checked with these rows, the batch of `prepared` on the host, and what leaks."""
    programs = Programs(prepared, backward=False)
    config, before = prepared.config, programs.run()
    lines = []
    for name in ("encoder", "decoder"):
        ids = rows.encoder_BS if name == "encoder" else rows.decoder_BL
        segments = rows.encoder_segments_BS if name == "encoder" else rows.decoder_segments_BL
        if ids is None or segments is None or not (padding := segments == 0).any():
            continue
        after = programs.run(batch=_changed(prepared, rows, name, padding))
        lines.append(_line(f"padding of the {name}", int(padding.sum()), first_change(before, after)))
    if config.model.has_decoder:
        length = rows.decoder_BL.shape[1]
        future = np.zeros(rows.decoder_BL.shape, bool)
        future[:, length // 2 :] = True
        if rows.prefix_BL is not None:  # a prefix is read by all positions of its document
            future &= ~np.logical_or.accumulate(rows.prefix_BL[:, ::-1], axis=1)[:, ::-1]
        start = int(np.argmax(future.any(0))) if future.any() else length
        after = programs.run(batch=_changed(prepared, rows, "decoder", future))
        before_it = lambda values: {
            name: x[:, :start] for name, x in values.items() if name.startswith(("decoder/", "logits"))
        }
        same = [row for row in range(len(future)) if not future[row, :start].any()]
        pick = lambda values: {name: x[same] for name, x in before_it(values).items()}
        lines.append(_line("later targets", int(future.sum()), first_change(pick(before), pick(after))))
    return lines


def first_change(before: dict[str, Array], after: dict[str, Array]) -> str | None:
    """The first value of the layers that is not equal, and by how much it differs; None if all are equal."""
    for name, x in before.items():
        if name.startswith(("encoder/", "decoder/", "logits")) and not np.array_equal(x, after[name]):
            size = float(np.sqrt(np.mean(np.square(x)))) or 1.0
            return f"{name} changes by up to {np.abs(x - after[name]).max() / size:.2g} of its RMS"
    return None


def _changed(prepared: Step, rows: Batch, name: str, where: Array) -> Batch:
    field = "encoder_BS" if name == "encoder" else "decoder_BL"
    ids = getattr(rows, field)
    other = (ids + 7) % (prepared.config.tokenizer.vocab_size - prepared.config.tokenizer.num_sentinels)
    changed = rows._replace(**{field: np.where(where, other, ids).astype(ids.dtype)})
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), changed, prepared.batch)


def _line(what: str, count: int, leak: str | None) -> str:
    if leak is None:
        return f"checked    {what}: {count:,} other ids change nothing that must not read them"
    return f"LEAK       {what} is read: with {count:,} other ids, {leak}; check the attention mask there"
