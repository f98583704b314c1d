"""Answers to a batch of prompts as arrays: what the losses of `t5like rl` take.

A prompt has G answers: samples of the model, or a chosen and a rejected one. All arrays have the prompts as their first
dim, so that a mesh or microbatches never separate the answers of a prompt. The encoder reads each prompt once. In
packed rows (`packing`), this first dim is a group of prompts with its decoder rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from t5like.config.schema import Config
from t5like.data.tokenizers.vocabulary import DECODER_START_ID
from t5like.inference.prompt_format import Prompt
from t5like.types import Array, Batch


class Experience(NamedTuple):
    """Answers, and what the loss needs about them. L is the length of a decoder row: see `answer_rows`.

    Attributes:
        encoder_BS, encoder_segments_BS: int32 prompts of an encoder-decoder; None: decoder-only or encoder-only.
        decoder_BGL, targets_BGL: int32 as in `Batch`, for each answer; of an encoder-only model the same ids, prompt
            and answer, which its encoder reads.
        segments_BGL: int32, 0 for padding; None: nothing is padding (encoder-decoder: it is behind all targets).
        prefix_BGL: bool, see `Batch.prefix_BL`; None: no decoder-only model.
        mask_BGL: float32, 1 for tokens that are trained on: the answer, its EOS included.
        encoder_positions_BS, positions_BGL, sources_BGL: int32 positions and `Batch.decoder_sources_BL` of packed rows;
            None: they are not packed.
        places_BKG: int32 places of the answers to each prompt in packed rows, see `packing`; None: not packed.
        advantages_BGL: float32; None: pairs.
        sampler_log_p_BGL: float32 log-probabilities when the answers were sampled.
        old_log_p_BGL: float32 log-probabilities of the parameters before the first update with these answers; None:
            this is the first update.
        reference_log_p_BGL: float32 log-probabilities of the reference.
        old_values_BGL, returns_BGL: float32, of PPO's value head.
    """

    encoder_BS: Array | None
    encoder_segments_BS: Array | None
    decoder_BGL: Array
    targets_BGL: Array
    segments_BGL: Array | None
    prefix_BGL: Array | None
    mask_BGL: Array
    encoder_positions_BS: Array | None = None
    positions_BGL: Array | None = None
    sources_BGL: Array | None = None
    places_BKG: Array | None = None
    advantages_BGL: Array | None = None
    sampler_log_p_BGL: Array | None = None
    old_log_p_BGL: Array | None = None
    reference_log_p_BGL: Array | None = None
    old_values_BGL: Array | None = None
    returns_BGL: Array | None = None

    @property
    def numbers_BGL(self) -> Array | None:
        """The number of each token's answer in its row, from 1; None: each row is one answer (`answer_sums`)."""
        return None if self.positions_BGL is None else self.segments_BGL

    def answers(self) -> "Experience":
        """The answers alone, without what only a loss needs."""
        return Experience(*self[: Experience._fields.index("advantages_BGL")])

    def rows(self) -> Batch:
        """The batch that the model reads: one decoder row for each answer, one encoder row for each prompt."""
        flat = lambda x: None if x is None else x.reshape(-1, x.shape[-1])
        if self.encoder_BS is None and self.prefix_BGL is None:  # encoder-only
            targets = flat(self.targets_BGL), flat(self.mask_BGL)
            positions = {"encoder_positions_BS": flat(self.positions_BGL)}
            return Batch(None, *targets, flat(self.decoder_BGL), flat(self.segments_BGL), **positions)
        return Batch(
            flat(self.decoder_BGL),
            flat(self.targets_BGL),
            flat(self.mask_BGL),
            self.encoder_BS,
            self.encoder_segments_BS,
            decoder_segments_BL=flat(self.segments_BGL),
            encoder_positions_BS=self.encoder_positions_BS,
            decoder_positions_BL=flat(self.positions_BGL),
            decoder_sources_BL=flat(self.sources_BGL),
            prefix_BL=flat(self.prefix_BGL),
        )


def fits(config: Config, prompt: Prompt, answers: Sequence[Sequence[int]]) -> bool:
    """Whether a prompt and its answers are no longer than their rows."""
    data = config.data
    longest = max(map(len, answers), default=0)
    if config.model.architecture == "encoder":
        return len(prompt.ids) + longest <= data.inputs_length
    start = config.model.architecture == "decoder"  # its start token is not counted
    return len(prompt.ids) - start <= data.inputs_length and longest <= data.targets_length


def answer_rows(config: Config, prompts: Sequence[Prompt], answers: Sequence[Sequence[Sequence[int]]]) -> Experience:
    """Prompts and the ids of their answers as rows, as in supervised training.

    A row of an encoder-decoder has `data.targets_length` tokens, one of a decoder-only model also those of the prompt.
    An encoder-only model reads prompt and answer together in `data.inputs_length` tokens (`fits`).

    Args:
        config: of the run.
        prompts: at most `data.inputs_length` tokens each, and the start token of a decoder-only model.
        answers: the same number G for each prompt, at most `data.targets_length` tokens each.
    """
    data, count = config.data, len(answers[0])
    if config.model.architecture == "decoder":
        shape = len(prompts), count, config.row_length
        decoder_BGL, targets_BGL, segments_BGL = (np.zeros(shape, np.int32) for _ in range(3))
        mask_BGL, prefix_BGL = np.zeros(shape, np.float32), np.zeros(shape, bool)
        for b, (prompt, of_prompt) in enumerate(zip(prompts, answers, strict=True)):
            start = len(prompt.ids) - 1
            prefix_BGL[b, :, : prompt.prefix] = True
            for g, answer in enumerate(of_prompt):
                end = start + len(answer)
                decoder_BGL[b, g, :end] = [*prompt.ids, *answer[:-1]][:end]
                targets_BGL[b, g, start:end], mask_BGL[b, g, start:end] = answer, 1
                segments_BGL[b, g, : max(end, 1)] = 1
        return Experience(None, None, decoder_BGL, targets_BGL, segments_BGL, prefix_BGL, mask_BGL)
    if config.model.architecture == "encoder":
        shape = len(prompts), count, data.inputs_length
        ids_BGL, segments_BGL, mask_BGL = (np.zeros(shape, dtype) for dtype in (np.int32, np.int32, np.float32))
        for b, (prompt, of_prompt) in enumerate(zip(prompts, answers, strict=True)):
            start = len(prompt.ids)
            for g, answer in enumerate(of_prompt):
                end = start + len(answer)
                ids_BGL[b, g, :end], mask_BGL[b, g, start:end] = [*prompt.ids, *answer], 1
                segments_BGL[b, g, :end] = 1
        return Experience(None, None, ids_BGL, ids_BGL, segments_BGL, None, mask_BGL)
    encoder_BS, segments_BS = (np.zeros((len(prompts), data.inputs_length), np.int32) for _ in range(2))
    shape = len(prompts), count, data.targets_length
    decoder_BGL, targets_BGL = (np.zeros(shape, np.int32) for _ in range(2))
    mask_BGL = np.zeros(shape, np.float32)
    for b, (prompt, of_prompt) in enumerate(zip(prompts, answers, strict=True)):
        encoder_BS[b, : len(prompt.ids)] = prompt.ids
        segments_BS[b, : len(prompt.ids)] = 1
        for g, answer in enumerate(of_prompt):
            decoder_BGL[b, g, : len(answer)] = [DECODER_START_ID, *answer[:-1]][: len(answer)]
            targets_BGL[b, g, : len(answer)], mask_BGL[b, g, : len(answer)] = answer, 1
    ones_BGL = np.ones(shape, np.int32)  # padding is behind all targets, which attention is causal for
    return Experience(encoder_BS, segments_BS, decoder_BGL, targets_BGL, ones_BGL, None, mask_BGL)


def in_rows(experience: Experience, values_BGL: np.ndarray) -> np.ndarray:
    """Values of the answers' tokens, float32 [B, G, targets_length], at the positions of these tokens in their rows."""
    in_rows_BGL = np.zeros(experience.mask_BGL.shape, np.float32)
    lengths_BG = experience.mask_BGL.sum(-1).astype(int)
    in_rows_BGL[experience.mask_BGL > 0] = values_BGL[np.arange(values_BGL.shape[-1]) < lengths_BG[..., None]]
    return in_rows_BGL


def last_tokens(mask_BGL: Array) -> Array:
    """float32 [B, G, L]: 1 at the last token of each answer, one of each row, 0 elsewhere; of NumPy or JAX arrays."""
    return mask_BGL * (mask_BGL.cumsum(-1) == mask_BGL.sum(-1, keepdims=True))


def spec(config: Config) -> Experience:
    """Shapes and dtypes of a step's experience, from the config alone, as arrays of zeros that take no memory."""
    rl, size = config.rl, config.data.batch_size
    start = [0] if config.model.architecture == "decoder" else []
    rows = answer_rows(config, [Prompt([1, *start], 1)], [[[1]] * rl.answers])
    values_BGL = np.zeros((1, rl.answers, rows.mask_BGL.shape[-1]), np.float32)
    policy, with_values = rl.method == "policy", rl.method == "policy" and rl.advantage == "gae"
    rows = rows._replace(
        advantages_BGL=values_BGL if policy else None,
        sampler_log_p_BGL=values_BGL if policy else None,
        old_log_p_BGL=values_BGL if needs_old(config) else None,
        reference_log_p_BGL=values_BGL if rl.needs_reference else None,
        old_values_BGL=values_BGL if with_values else None,
        returns_BGL=values_BGL if with_values else None,
    )
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), (size, *x.shape[1:])), rows)


def needs_old(config: Config) -> bool:
    """Whether the loss needs the log-probabilities before the first update with the same answers."""
    return config.rl.method == "policy" and (config.rl.updates_per_rollout > 1 or config.rl.advantage == "gae")
