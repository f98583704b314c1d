"""Answers that the model samples for a batch of prompts, on the mesh, with the cached decoder of `t5like generate`.

In an encoder-decoder each prompt is encoded once for all of its answers. The result is a function of (parameters, seed,
row numbers): a row's random key does not depend on the step, the batch, or the number of devices and processes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from t5like.config.schema import Config
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.inference import decoding
from t5like.inference.generate import BUCKET, eos_ids
from t5like.inference.prompt_format import Prompt
from t5like.inference.sampling import TracedOptions
from t5like.sharding.placement import to_host
from t5like.types import Tree


class Answers(NamedTuple):
    """Answers to the prompts of a batch, G for each, on the host of every process.

    Attributes:
        ids: of each answer, EOS included.
        texts: without EOS.
        log_p_BGL: float32 log-probabilities of the ids at the sampling temperature; 0 after the end.
        truncated_BG: bool, True for answers that reached the limit without EOS.
    """

    ids: list[list[list[int]]]
    texts: list[list[str]]
    log_p_BGL: np.ndarray
    truncated_BG: np.ndarray

    @property
    def lengths_BG(self) -> np.ndarray:
        """int64 tokens of each answer, EOS included."""
        return np.array([[len(answer) for answer in of_prompt] for of_prompt in self.ids])


class Sampler:
    """Samples answers with one config, whose programs are compiled once for each length of the prompts."""

    def __init__(self, config: Config, mesh: jax.sharding.Mesh, tokenizer: Tokenizer):
        """`config` is resolved for `mesh`."""
        self._config, self._mesh, self._tokenizer = config, mesh, tokenizer
        self._eos_ids = np.array(eos_ids(config, tokenizer), np.int32)

    def __call__(
        self,
        params: Tree,
        prompts: Sequence[Prompt],
        rows_B: np.ndarray,
        *,
        answers: int,
        temperature: float,
        seed: int,
    ) -> Answers:
        """Sample `answers` per prompt, or decode greedily with temperature 0 (then one). All processes call it.

        Args:
            params: of the model.
            prompts: as many as the devices of the batch divide.
            rows_B: int64, with `seed` they determine the random key of each prompt.
            answers: G.
            temperature: of the sampling.
            seed: at most 2^32 - 1.
        """
        decoder_only = self._config.model.architecture == "decoder"
        width = -(-max(len(prompt.ids) for prompt in prompts) // BUCKET) * BUCKET
        prompt_BP = np.zeros((len(prompts), width), np.int32)
        for row, prompt in enumerate(prompts):
            prompt_BP[row, width - len(prompt.ids) if decoder_only else 0 :][: len(prompt.ids)] = prompt.ids
        with jax.set_mesh(self._mesh):
            output = decoding.decode_texts(
                self._config.of_model(),
                params,
                prompt_BP,
                np.array([len(prompt.ids) for prompt in prompts], np.int32),
                decoding.row_keys(np.uint32(seed), rows_B.astype(np.uint32)),
                self._eos_ids,
                TracedOptions(temperature=np.float32(temperature) if temperature else None),
                np.array([prompt.prefix for prompt in prompts], np.int32),
                max_new_tokens=self._config.data.targets_length,
                num_texts=answers,
                sampled_log_p=True,
            )
            ids_BGL, log_p_BGL = to_host(output.ids_BGL), to_host(output.log_p_BGL)
        ends_BGL = np.isin(ids_BGL, self._eos_ids)
        length_BG = np.where(ends_BGL.any(-1), ends_BGL.argmax(-1) + 1, ids_BGL.shape[-1])
        truncated_BG = ~ends_BGL.any(-1)
        ids = [
            [row[:length] for row, length in zip(rows, lengths, strict=True)]
            for rows, lengths in zip(ids_BGL.tolist(), length_BG.tolist(), strict=True)
        ]
        texts = [
            [
                self._tokenizer.decode(answer if cut else answer[:-1])
                for answer, cut in zip(of_prompt, cuts, strict=True)
            ]
            for of_prompt, cuts in zip(ids, truncated_BG.tolist(), strict=True)
        ]
        return Answers(ids, texts, log_p_BGL, truncated_BG)
