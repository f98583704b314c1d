"""Log-likelihoods of given targets, in rows built as in training."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5like.config.schema import Config
from t5like.data.tokenizers.vocabulary import DECODER_START_ID
from t5like.inference.generate import Prompt
from t5like.model.transformer import Transformer
from t5like.optim import losses
from t5like.types import Batch, Tree

SCORING_ROWS = 32  # prompts that are answered at a time


def scoring_batch(config: Config, pairs: Sequence[tuple[Prompt, Sequence[int]]], width: int, longest: int) -> Batch:
    """Rows of prompts and their answers, as in training: `width` ids for the prompt, `longest` for the answer."""
    if config.model.architecture == "decoder":
        rows = len(pairs), width + longest
        ids_BL, targets_BL, segments_BL = (np.zeros(rows, np.int32) for _ in range(3))
        weights_BL, prefix_BL = np.zeros(rows, np.float32), np.zeros(rows, bool)
        for row, (prompt, answer) in enumerate(pairs):
            read, end = len(prompt.ids), len(prompt.ids) + len(answer) - 1
            ids_BL[row, :end] = [*prompt.ids, *answer[:-1]]
            targets_BL[row, read - 1 : end] = answer
            weights_BL[row, read - 1 : end] = 1
            segments_BL[row, :end] = 1
            prefix_BL[row, : prompt.prefix] = True
        return Batch(ids_BL, targets_BL, weights_BL, decoder_segments_BL=segments_BL, prefix_BL=prefix_BL)
    ids_BS, segments_BS = (np.zeros((len(pairs), width), np.int32) for _ in range(2))
    ids_BL, targets_BL = (np.zeros((len(pairs), longest), np.int32) for _ in range(2))
    weights_BL = np.zeros((len(pairs), longest), np.float32)
    for row, (prompt, answer) in enumerate(pairs):
        ids_BS[row, : len(prompt.ids)] = prompt.ids
        segments_BS[row, : len(prompt.ids)] = 1
        ids_BL[row, : len(answer)] = [DECODER_START_ID, *answer[:-1]]
        targets_BL[row, : len(answer)] = answer
        weights_BL[row, : len(answer)] = 1
    ones_BL = np.ones(ids_BL.shape, np.int32)
    return Batch(ids_BL, targets_BL, weights_BL, ids_BS, segments_BS, ones_BL)


class TargetScores(NamedTuple):
    """Of each row's weighted targets together.

    Attributes:
        nats_B: float32, their -log p; the likeliest has the fewest.
        greedy_B: bool, whether each of them is the likeliest token at its place.
    """

    nats_B: jax.Array
    greedy_B: jax.Array


@partial(jax.jit, static_argnames=("config", "ends"))
def score_targets(config: Config, params: Tree, batch: Batch, ends: tuple[int, ...] = ()) -> TargetScores:
    """How likely the rows' targets are, given what the rows read.

    Where `ends`, the ids that end a text, are several, the first of them as a target stands for any.
    """
    logits_BLV = Transformer(config).apply({"params": params}, batch)
    nats_BL = losses.nats(logits_BLV, batch.targets_BL)
    hit_BL = logits_BLV.argmax(-1) == batch.targets_BL
    if len(ends) > 1:
        ends_BLE = logits_BLV[..., np.array(ends)].astype(jnp.float32)
        one_BL = jnp.take_along_axis(logits_BLV, batch.targets_BL[..., None], axis=-1)[..., 0].astype(jnp.float32)
        end_BL = batch.targets_BL == ends[0]
        nats_BL = jnp.where(end_BL, nats_BL + one_BL - jax.nn.logsumexp(ends_BLE, axis=-1), nats_BL)
        hit_BL = jnp.where(end_BL, ends_BLE.max(-1) >= logits_BLV.max(-1), hit_BL)
    likeliest_BL = hit_BL | (batch.weights_BL == 0)
    return TargetScores((nats_BL * batch.weights_BL).sum(1), likeliest_BL.all(1))
