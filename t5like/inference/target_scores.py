"""Log-likelihoods of given targets, in rows built as in training.

Used by `inference.loglikelihood` and `evaluation.task_eval`.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5like.config.schema import Config
from t5like.data.tokenizers.vocabulary import DECODER_START_ID
from t5like.inference.prompt_format import Prompt
from t5like.model.transformer import Transformer
from t5like.optim import losses
from t5like.types import Batch, Tree

SCORING_ROWS = 32  # rows per batch


def scoring_batch(
    config: Config, pairs: Sequence[tuple[Prompt, Sequence[int]]], prompt_length: int, target_length: int
) -> Batch:
    """A batch with one row per pair of prompt and target ids, as in training, padded to the two lengths."""
    if config.model.architecture == "decoder":
        rows = len(pairs), prompt_length + target_length
        ids_BL, targets_BL, segments_BL = (np.zeros(rows, np.int32) for _ in range(3))
        weights_BL, prefix_BL = np.zeros(rows, np.float32), np.zeros(rows, bool)
        for row, (prompt, target) in enumerate(pairs):
            start, end = len(prompt.ids) - 1, len(prompt.ids) + len(target) - 1
            ids_BL[row, :end] = [*prompt.ids, *target[:-1]]
            targets_BL[row, start:end] = target
            weights_BL[row, start:end] = 1
            segments_BL[row, :end] = 1
            prefix_BL[row, : prompt.prefix] = True
        return Batch(ids_BL, targets_BL, weights_BL, decoder_segments_BL=segments_BL, prefix_BL=prefix_BL)
    ids_BS, segments_BS = (np.zeros((len(pairs), prompt_length), np.int32) for _ in range(2))
    ids_BL, targets_BL = (np.zeros((len(pairs), target_length), np.int32) for _ in range(2))
    weights_BL = np.zeros((len(pairs), target_length), np.float32)
    for row, (prompt, target) in enumerate(pairs):
        ids_BS[row, : len(prompt.ids)] = prompt.ids
        segments_BS[row, : len(prompt.ids)] = 1
        ids_BL[row, : len(target)] = [DECODER_START_ID, *target[:-1]]
        targets_BL[row, : len(target)] = target
        weights_BL[row, : len(target)] = 1
    ones_BL = np.ones(ids_BL.shape, np.int32)
    return Batch(ids_BL, targets_BL, weights_BL, ids_BS, segments_BS, ones_BL)


class TargetScores(NamedTuple):
    """Scores of each row's weighted targets.

    Attributes:
        nats_B: float32, -log p of all targets of a row.
        greedy_B: bool, whether every target is the most likely token at its position.
    """

    nats_B: jax.Array
    greedy_B: jax.Array


@partial(jax.jit, static_argnames=("config", "eos_ids"))
def score_targets(config: Config, params: Tree, batch: Batch, eos_ids: tuple[int, ...] = ()) -> TargetScores:
    """Log-likelihood of each row's targets, given the row's inputs.

    If there are several `eos_ids`, the first of them as a target stands for any of them: its probability is their sum.
    """
    logits_BLV = Transformer(config).apply({"params": params}, batch)
    nats_BL = losses.nats(logits_BLV, batch.targets_BL)
    greedy_BL = logits_BLV.argmax(-1) == batch.targets_BL
    if len(eos_ids) > 1:
        eos_logits_BLE = logits_BLV[..., np.array(eos_ids)].astype(jnp.float32)
        target_BL = jnp.take_along_axis(logits_BLV, batch.targets_BL[..., None], axis=-1)[..., 0].astype(jnp.float32)
        is_eos_BL = batch.targets_BL == eos_ids[0]
        nats_BL = jnp.where(is_eos_BL, nats_BL + target_BL - jax.nn.logsumexp(eos_logits_BLE, axis=-1), nats_BL)
        greedy_BL = jnp.where(is_eos_BL, eos_logits_BLE.max(-1) >= logits_BLV.max(-1), greedy_BL)
    greedy_BL = greedy_BL | (batch.weights_BL == 0)
    return TargetScores((nats_BL * batch.weights_BL).sum(1), greedy_BL.all(1))
