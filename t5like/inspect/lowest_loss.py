"""The lowest loss that any model can have on given batches, in nats per target token.

Label smoothing of e moves the best probability of a target from 1 to 1 - e: the floor of a target is then -ln(1 - e).
The z-loss does not raise it, because log Z = 0 is possible with any probabilities. Where the same context occurs with
different targets, as at the first position of causal rows, no model can predict them all: the best probability of
target t is the smoothed share of t among the targets of that context. Contexts are compared exactly: what the encoder
reads of the document, and what the decoder has read of it. A model with a sliding window sees less, so its floor may be
higher. Called by `overfit`.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from t5like.types import Array, Batch


class Floor(NamedTuple):
    """The lowest loss, nats per target token, and the share of the targets whose context has several targets."""

    nats: float
    shared: float


def lowest_loss(batches: Sequence[Batch], *, label_smoothing: float, vocab_size: int) -> Floor:
    """The lowest loss on all of these batches together, which are on the host."""
    targets: dict[bytes, Counter[int]] = defaultdict(Counter)
    for batch in batches:
        for context, target, weight in _targets(batch):
            targets[context][target] += weight
    total = nats = shared = 0.0
    for counts in targets.values():
        weight = sum(counts.values())
        total += weight
        shared += weight * (len(counts) > 1)
        for count in counts.values():
            share = count / weight
            best = (1 - label_smoothing) * share + label_smoothing * (1 - share) / (vocab_size - 1)
            nats -= count * math.log(best)
    return Floor(nats / max(total, 1e-30), shared / max(total, 1e-30))


def _targets(batch: Batch) -> Iterator[tuple[bytes, int, float]]:
    """The context of each target, as a digest, the target, and its weight."""
    for row in range(len(batch.targets_BL)):
        one = Batch(*(None if x is None else np.asarray(x[row]) for x in batch))
        contexts = _encoder_contexts(one) if one.decoder_BL is None else _decoder_contexts(one)
        for place in np.flatnonzero(one.weights_BL):
            yield contexts[place], int(one.targets_BL[place]), float(one.weights_BL[place])


def _encoder_contexts(row: Batch) -> list[bytes]:
    """Of an encoder-only row: all of the document, and the place in it."""
    segments = _segments(row.encoder_segments_BS, row.encoder_BS)
    digests = {segment: _digest(row.encoder_BS[segments == segment]).digest() for segment in np.unique(segments)}
    starts = {segment: int(np.argmax(segments == segment)) for segment in digests}
    return [digests[each] + (place - starts[each]).to_bytes(4, "little") for place, each in enumerate(segments)]


def _decoder_contexts(row: Batch) -> list[bytes]:
    """What the encoder reads of the document, its prefix, and the decoder's ids up to each place."""
    segments = _segments(row.decoder_segments_BL, row.decoder_BL)
    inputs = None if row.encoder_BS is None else _segments(row.encoder_segments_BS, row.encoder_BS)
    contexts, running = [], {}
    for place, segment in enumerate(segments):
        if segment not in running:
            digest = _digest(row.encoder_BS[inputs == segment] if inputs is not None else np.zeros(0, np.int32))
            if row.prefix_BL is not None:
                digest.update(b"prefix" + row.decoder_BL[(segments == segment) & row.prefix_BL].tobytes())
            running[segment] = digest
        running[segment].update(row.decoder_BL[place].tobytes())
        contexts.append(running[segment].digest())
    return contexts


def _segments(segments: Array | None, ids: Array) -> Array:
    return np.ones(len(ids), np.int32) if segments is None else segments


def _digest(ids: Array) -> "hashlib.blake2b":
    return hashlib.blake2b(np.ascontiguousarray(ids).tobytes(), digest_size=16)
