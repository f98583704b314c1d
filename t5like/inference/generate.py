"""Text generation: prompts as text in, generated text out.

`Generator` puts a tokenizer and a prompt format around the compiled program of `inference.decoding`. It is used by
`cli.prompts` (the command line), `evaluation` and `inference.loglikelihood`.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from t5like.config.schema import Config
from t5like.data.objectives.masking import MASK
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.errors import ConfigError
from t5like.inference import decoding
from t5like.inference.prompt_format import SENTINEL_PREFIX, Prompt, PromptFormat
from t5like.inference.sampling import DecodeOutput, DecodingOptions
from t5like.sharding import memory
from t5like.sharding.placement import to_host
from t5like.types import Batch, Tree

BUCKET = 32  # prompts are padded to a multiple of this length, so that few shapes are compiled

_unstack = jax.jit(decoding.unstack_params, static_argnums=0)


def eos_ids(config: Config, tokenizer: Tokenizer) -> tuple[int, ...]:
    """All ids that end a text, the tokenizer's own first. transformers also stops at each id of its eos_token_id."""
    return tuple(dict.fromkeys((tokenizer.eos_id, *config.tokenizer.extra_eos_ids)))


class Answer(NamedTuple):
    """A generated text.

    Attributes:
        text: without the id or stop text that ended it.
        ids: the tokens, including the one that ended the text (EOS, or the last token of a stop text).
        log_prob: sum of `token_log_probs`.
        token_log_probs: nats of each token under the model itself, without temperature or penalty.
    """

    text: str
    ids: list[int]
    log_prob: float
    token_log_probs: list[float]


class Generator:
    """Generates texts with one model. Works on the mesh that the caller has set (`jax.set_mesh`)."""

    def __init__(self, config: Config, params: Tree, tokenizer: Tokenizer):
        """`config` is resolved; `params` may be sharded."""
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self.prompt_format = PromptFormat.of(config, tokenizer)
        self.eos_ids = eos_ids(config, tokenizer)
        self._unstacked: Tree = None

    def __call__(
        self, prompts: Sequence[str], *, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """One generated text per prompt. A model trained on span corruption fills <extra_id_N> in the prompt.

        An encoder-only model returns the prompt, with each <extra_id_0> in it replaced by one token.

        Raises:
            ConfigError: a prompt or the text is longer than the model's learned positions.
        """
        self.refuse_labels()
        if self.config.model.architecture == "encoder":
            return [self._unmask(prompt) for prompt in prompts]
        rows = [self.prompt(text) for text in prompts]
        return self.texts(self.ids(rows, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed))

    def prompt(self, text: str) -> Prompt:
        """A text in the model's prompt format."""
        return self.prompt_format.prompt(text, self.tokenizer)

    def answer(
        self, prompts: Sequence[Prompt], options: DecodingOptions, width: int = 1, rows: Sequence[int] | None = None
    ) -> list[list[Answer]]:
        """`options.num_returned` texts per prompt, the best first.

        Args:
            prompts: see `prompt`.
            options: how texts are decoded.
            width: minimum padded length of the prompts, so that calls share a compiled program.
            rows: numbers that with `options.seed` determine each prompt's random key; default: 0, 1, ...

        Raises:
            ConfigError: a prompt or the text is longer than the model's learned positions, or there are more beams
                than the vocabulary has tokens for.
        """
        stop_ids = self._stop_ids(options)
        output = self._decode(prompts, options, width, rows)
        return [
            [
                self._answer(ids, log_p, stop_ids, options.stop)
                for ids, log_p in zip(ids_GL.tolist(), log_p_GL.tolist(), strict=True)
            ][: options.num_returned]
            for ids_GL, log_p_GL in zip(output.ids_BGL, output.log_p_BGL, strict=True)
        ]

    def ids(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        width: int = 1,
    ) -> np.ndarray:
        """Ids of one text each: int32 [len(prompts), max_new_tokens], 0 after its end. `width` as in `answer`."""
        options = DecodingOptions(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        return self._decode(prompts, options, width, None).ids_BGL[:, 0]

    def max_new_tokens(self, prompts: Sequence[Prompt]) -> int:
        """The largest number of new tokens that the model has positions for."""
        longest = max(len(prompt.ids) for prompt in prompts)
        used = num_positions(self.config, longest, 1) - 1 if self._decoder_only else 0
        return self.config.model.longest_text - used

    def check(self, prompt: Prompt, options: DecodingOptions) -> None:
        """Refuse options that the model does not support for this prompt.

        Raises:
            ConfigError: see `answer`.
        """
        self._check_length(num_positions(self.config, len(prompt.ids), options.max_new_tokens))
        memory.check_texts(self.config, prompt=len(prompt.ids), new=options.max_new_tokens, texts=options.num_texts)
        most = self.config.tokenizer.vocab_size // (1 + len(self._stop_ids(options)))
        if 1 < options.num_beams > most:
            raise ConfigError(
                f"--num_beams={options.num_beams} is too many for a vocabulary of "
                f"{self.config.tokenizer.vocab_size}; use at most --num_beams={most}"
            )

    @property
    def _decoder_only(self) -> bool:
        return self.config.model.architecture == "decoder"

    def _decode(
        self, prompts: Sequence[Prompt], options: DecodingOptions, width: int, rows: Sequence[int] | None
    ) -> DecodeOutput:
        for prompt in prompts:
            self.check(prompt, options)
        count, mesh = len(prompts), jax.sharding.get_abstract_mesh()
        shards = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
        row_numbers = list(range(count) if rows is None else rows)
        padding_rows = -count % shards  # each device gets the same number of rows
        prompts = [*prompts, *[prompts[0]] * padding_rows]
        row_numbers = np.array(row_numbers + row_numbers[:1] * padding_rows)
        width = -(-max(width, *(len(prompt.ids) for prompt in prompts)) // BUCKET) * BUCKET
        prompt_BP, lengths_B = self._padded([prompt.ids for prompt in prompts], width, left=self._decoder_only)
        if self._unstacked is None:
            unrolled = self.config.model.layers == "unroll"
            self._unstacked = _unstack(self.config.of_model(), self.params) if unrolled else self.params
        output = decoding.decode_texts(
            self.config.of_model(),
            self._unstacked,
            prompt_BP,
            lengths_B,
            decoding.row_keys(np.uint32(options.seed), row_numbers),
            np.array(self._stop_ids(options), np.int32),
            jax.tree.map(np.float32, options.traced),
            np.array([prompt.prefix for prompt in prompts], np.int32),
            max_new_tokens=options.max_new_tokens,
            num_texts=options.num_texts,
            use_beams=options.num_beams > 1,
            top_k=options.top_k,
        )
        return jax.tree.map(lambda x: to_host(x)[:count], output)

    def _stop_ids(self, options: DecodingOptions) -> list[int]:
        """Ids that end a text: `eos_ids`, and sentinels among the stop texts. Other stop texts are cut off later."""
        encoded = [self.tokenizer.encode_with_sentinels(text) for text in options.stop if SENTINEL_PREFIX in text]
        sentinels = {int(token) for token in self.tokenizer.sentinel_ids}
        return [*self.eos_ids, *(ids[0] for ids in encoded if len(ids) == 1 and ids[0] in sentinels)]

    def _answer(self, ids: list[int], log_p: list[float], stop_ids: list[int], stop: Sequence[str]) -> Answer:
        decode = self.tokenizer.decode
        count = next((index + 1 for index, token in enumerate(ids) if token in stop_ids), len(ids))
        full_text = decode(ids[: count - 1] if ids[count - 1] in stop_ids else ids[:count])
        if (text := truncate_at_stop(full_text, stop)) != full_text:
            count = next(n for n in range(1, count + 1) if any(one in decode(ids[:n]) for one in stop))
        return Answer(text, ids[:count], float(np.sum(log_p[:count])), log_p[:count])

    def texts(self, ids_BL: np.ndarray) -> list[str]:
        """Generated ids as text, up to the first id that ends a text: all ids after it are padding."""
        is_text = lambda token: token not in self.eos_ids
        return [self.tokenizer.decode(itertools.takewhile(is_text, row.tolist())) for row in ids_BL]

    def predict_tokens(self, batch: Batch) -> np.ndarray:
        """The most likely token at each position of an encoder-only model's rows: int32 [B, S]."""
        return to_host(decoding.predict_tokens(self.config.of_model(), self.params, batch))

    def _unmask(self, text: str) -> str:
        tokenizer, row = self.tokenizer, self.prompt(text).ids
        mask = int(tokenizer.sentinel_ids[MASK])
        self._check_length(num_positions(self.config, len(row), 0))
        ids_1S, lengths_1 = self._padded([row], -(-len(row) // BUCKET) * BUCKET, left=False)
        is_text_1S = (np.arange(ids_1S.shape[1])[None] < lengths_1[:, None]).astype(np.int32)
        predicted_S = self.predict_tokens(Batch(None, ids_1S, is_text_1S.astype(np.float32), ids_1S, is_text_1S))[0]
        return tokenizer.decode([int(predicted_S[i]) if token == mask else token for i, token in enumerate(row)][1:-1])

    def refuse_labels(self) -> None:
        """Raise ConfigError if the model predicts labels instead of text."""
        if objective := self.config.data.label_objective:
            raise ConfigError(f"data.objective={objective}: this model predicts labels, not text; use t5like predict")

    def _check_length(self, longest: int) -> None:
        if longest > self.config.model.longest_text:
            raise ConfigError(
                f"a text of {longest} tokens does not fit model.max_length={self.config.model.max_length}; "
                "use a shorter prompt or a smaller --max_new_tokens"
            )

    def _padded(self, rows: Sequence[Sequence[int]], width: int, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
        padded_BP = np.zeros((len(rows), width), np.int32)
        for index, row in enumerate(rows):
            padded_BP[index, width - len(row) if left else 0 :][: len(row)] = row
        return padded_BP, np.array([len(row) for row in rows], np.int32)


def truncate_at_stop(text: str, stop: Sequence[str]) -> str:
    """A text up to the first occurrence of any of the stop texts; an empty stop text is ignored."""
    return text[: min((index for end in stop if end and (index := text.find(end)) >= 0), default=len(text))]


def num_positions(config: Config, prompt: int, new: int) -> int:
    """Positions that a prompt and its generated text need, in the stack that needs more; lengths in tokens.

    A decoder-only model has both in one sequence, whose last token is never an input. An encoder-only model generates
    no text.
    """
    return {"decoder": prompt + new - 1, "encoder": prompt}.get(config.model.architecture, max(prompt, new))
