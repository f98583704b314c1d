"""Text from a model: encode or read the prompt once, then one token at a time from the key-value cache.

`generate` is one jitted program on ids; `Generator` puts a tokenizer around it, for the command line and for what a
training run shows at its end. Greedy, or sampled with a temperature. Prompts of a batch may differ in length.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5like.config import Config
from t5like.data.masking import CLS, MASK
from t5like.data.objectives import MODES
from t5like.data.templates import render_prompt
from t5like.data.text import START
from t5like.data.tokenizer import Tokenizer
from t5like.errors import ConfigError
from t5like.mesh import to_host
from t5like.model.attention import causal_mask, segment_mask
from t5like.model.transformer import Transformer
from t5like.types import Batch, Tree

BUCKET = 32  # prompt lengths are padded up to a multiple, so that few shapes are compiled


@partial(jax.jit, static_argnames=("config", "max_new_tokens", "eos"))
def generate(
    config: Config,
    params: Tree,
    prompt_BP: jax.Array,
    lengths_B: jax.Array,
    key: jax.Array,
    *,
    max_new_tokens: int,
    eos: int,
    prefix_B: jax.Array | None = None,
    temperature: jax.Array | float = 0.0,
) -> jax.Array:
    """Continue each prompt until EOS or for `max_new_tokens`.

    Args:
        config: a settled one (no `auto`).
        params: the model's parameters.
        prompt_BP: ids. Encoder-decoder: what the encoder reads, padded on the right. Decoder-only: the text to
            continue, padded on the left, at least one token each.
        lengths_B: real tokens of each prompt.
        key: of the sampling.
        max_new_tokens: at most so many tokens are made.
        eos: the id that ends a row.
        prefix_B: decoder-only: how many of each prompt's tokens see each other in both directions; None: none.
        temperature: 0 takes the likeliest token; else softmax(logits / temperature) is sampled.

    Returns:
        int32 ids [B, max_new_tokens], without the prompt; after EOS all 0.
    """
    model = Transformer(config)
    apply = partial(model.apply, {"params": params})
    rows, width = prompt_BP.shape
    place_1P = jnp.arange(width)[None]
    if config.model.architecture == "encoder_decoder":
        real_BP = (place_1P < lengths_B[:, None]).astype(jnp.int32)
        encoded_BSD = apply(prompt_BP, real_BP, method="encode")
        cache = apply(rows, max_new_tokens, encoded_BSD, method="prepare_cache")
        cross_mask = segment_mask(jnp.ones((rows, 1), jnp.int32), real_BP)
        offset_B, first, length = jnp.zeros((rows,), jnp.int32), 0, max_new_tokens
        logits_B1V, cache = apply(jnp.full((rows, 1), START), cache, 0, cross_mask_B1LS=cross_mask, method="decode")
    else:
        offset_B, first, length = width - lengths_B, width - 1, width + max_new_tokens
        cache, cross_mask = apply(rows, length, method="prepare_cache"), None
        key_1S = jnp.arange(length)[None]
        visible_B1LS = causal_mask(width, length)
        if prefix_B is not None:
            visible_B1LS = visible_B1LS | (key_1S < (offset_B + prefix_B)[:, None])[:, None, None]
        visible_B1LS = visible_B1LS & (key_1S >= offset_B[:, None])[:, None, None]
        positions_BP = jnp.maximum(place_1P - offset_B[:, None], 0)
        logits_BPV, cache = apply(
            prompt_BP, cache, 0, positions_BL=positions_BP, mask_B1LS=visible_B1LS, method="decode"
        )
        logits_B1V = logits_BPV[:, -1:]

    def choose(logits_B1V, step):
        scores_BV = logits_B1V[:, 0]
        sampled = jax.random.categorical(jax.random.fold_in(key, step), scores_BV / jnp.maximum(temperature, 1e-6))
        return jnp.where(temperature > 0, sampled, scores_BV.argmax(-1)).astype(jnp.int32)

    def unfinished(carry):
        step, _, done_B, _, _ = carry
        return (step < max_new_tokens) & ~done_B.all()

    def advance(carry):
        step, ids_BL, done_B, logits_B1V, cache = carry
        next_B = jnp.where(done_B, 0, choose(logits_B1V, step))
        ids_BL = jax.lax.dynamic_update_index_in_dim(ids_BL, next_B, step, axis=1)
        index = first + 1 + step
        mask = (jnp.arange(length)[None] <= index) & (jnp.arange(length)[None] >= offset_B[:, None])
        logits_B1V, cache = apply(
            next_B[:, None],
            cache,
            index,
            positions_BL=(index - offset_B)[:, None],
            mask_B1LS=mask[:, None, None],
            cross_mask_B1LS=cross_mask,
            method="decode",
        )
        return step + 1, ids_BL, done_B | (next_B == eos), logits_B1V, cache

    start = (0, jnp.zeros((rows, max_new_tokens), jnp.int32), jnp.zeros((rows,), bool), logits_B1V, cache)
    return jax.lax.while_loop(unfinished, advance, start)[1]


@partial(jax.jit, static_argnames="config")
def likeliest(config: Config, params: Tree, batch: Batch) -> jax.Array:
    """What an encoder-only model says stands at each place: int32 [B, S]."""
    return Transformer(config).apply({"params": params}, batch).argmax(-1).astype(jnp.int32)


class Prompt(NamedTuple):
    """A prompt as the model reads it.

    Attributes:
        ids: of the encoder's text, or of the text that a decoder-only model continues.
        prefix: how many of a decoder-only model's ids see each other in both directions.
    """

    ids: list[int]
    prefix: int = 0


class Generator:
    """Prompts as text in, text out."""

    def __init__(self, config: Config, params: Tree, tokenizer: Tokenizer):
        """`config` is settled; `params` may be sharded."""
        self.config, self.params, self.tokenizer = config, params, tokenizer

    def __call__(
        self, prompts: Sequence[str], *, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """What the model says to each prompt. A model trained on span corruption reads <extra_id_N> as a gap to fill.

        An encoder-only model repeats the prompt, with each <extra_id_0> in it replaced by one token.

        Raises:
            ConfigError: a prompt or the answer is longer than the model's learned positions.
        """
        if self.config.model.architecture == "encoder":
            return [self._unmask(prompt) for prompt in prompts]
        rows = [self.prompt(text) for text in prompts]
        return self.texts(self.ids(rows, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed))

    def prompt(self, text: str) -> Prompt:
        """A text as the objectives that the model was trained on would show it.

        With `data.messages_field` it is what a user says. Gap filling, UL2 and supervised rows are an input, ended by
        EOS, and an answer; [R], [S] or [X] at the beginning is UL2's mode token. Causal and prefix LM go on with the
        text itself: that is taken where a model knows both and the text has no gap.
        """
        tokenizer, objectives = self.tokenizer, set(self.config.data.objective)
        decoder_only = self.config.model.architecture == "decoder"
        if self.config.data.messages_field:
            turns = render_prompt([{"role": "user", "content": text}])
            ids = [token for turn in turns for token in (*tokenizer.encode(turn), tokenizer.eos_id)]
            return Prompt([START, *ids] if decoder_only else ids)
        mode = re.match(r"\[([RSX])\] ?", text) if "ul2" in objectives else None
        answers = bool(objectives & {"span_corruption", "ul2", "supervised"})
        if answers and objectives & {"prefix_lm", *(["causal_lm"] if decoder_only else [])}:
            answers = "<extra_id_" in text or mode is not None
        begin = [] if mode is None else [int(tokenizer.sentinel_ids[-1 - MODES.index(mode[1])])]
        ids = begin + tokenizer.encode_with_sentinels(text[mode.end() :] if mode else text)
        if answers and not (mode and mode[1] == "S"):  # the S-denoiser's input is a text that goes on
            ids.append(tokenizer.eos_id)
        if not decoder_only:
            if objectives == {"causal_lm"} and ids:
                raise ConfigError(
                    "--prompt: this encoder-decoder was trained on causal_lm alone, whose encoder reads nothing; "
                    "use --prompt=''"
                )
            return Prompt(ids or [tokenizer.eos_id])
        if answers:
            return Prompt([*ids, START], len(ids))
        ids = ids or [tokenizer.eos_id]  # EOS stands between documents: it begins a new one
        return Prompt(ids, len(ids) if "prefix_lm" in objectives else 0)

    def ids(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        width: int = 1,
    ) -> np.ndarray:
        """The same on ids: int32 [len(prompts), max_new_tokens], 0 after EOS. `width`: pad prompts at least to it."""
        rows, model = [prompt.ids for prompt in prompts], self.config.model
        longest = max(map(len, rows))
        # The last token that is made is never read.
        decoder_only = model.architecture == "decoder"
        self._check_length(longest + max_new_tokens - 1 if decoder_only else max(longest, max_new_tokens))
        width = -(-max(longest, width) // BUCKET) * BUCKET
        prompt_BP, lengths_B = self._padded(rows, width, left=decoder_only)
        ids = generate(
            self.config,
            self.params,
            prompt_BP,
            lengths_B,
            jax.random.key(seed),
            max_new_tokens=max_new_tokens,
            eos=self.tokenizer.eos_id,
            prefix_B=np.array([prompt.prefix for prompt in prompts], np.int32),
            temperature=np.float32(temperature),
        )
        return to_host(ids)

    def texts(self, ids_BL: np.ndarray) -> list[str]:
        """Generated ids as text, up to EOS: what is behind it is padding, whatever its id means."""
        rows = [row.tolist() for row in ids_BL]
        return [
            self.tokenizer.decode(row[: [*row, self.tokenizer.eos_id].index(self.tokenizer.eos_id)]) for row in rows
        ]

    def likeliest(self, batch: Batch) -> np.ndarray:
        """An encoder-only model's guess at each place of a batch's rows: int32 [B, S]."""
        return to_host(likeliest(self.config, self.params, batch))

    def _unmask(self, prompt: str) -> str:
        tokenizer = self.tokenizer
        mask, cls = (int(tokenizer.sentinel_ids[number]) for number in (MASK, CLS))
        row = [cls, *tokenizer.encode_with_sentinels(prompt), tokenizer.eos_id]
        self._check_length(len(row))
        ids_1S, lengths_1 = self._padded([row], -(-len(row) // BUCKET) * BUCKET, left=False)
        real_1S = (np.arange(ids_1S.shape[1])[None] < lengths_1[:, None]).astype(np.int32)
        said = self.likeliest(Batch(None, ids_1S, real_1S.astype(np.float32), ids_1S, real_1S))[0]
        return tokenizer.decode([int(said[i]) if token == mask else token for i, token in enumerate(row)][1:-1])

    def _check_length(self, longest: int) -> None:
        model = self.config.model
        if model.positions == "learned" and longest > model.max_length:
            raise ConfigError(
                f"a text of {longest} tokens does not fit model.max_length={model.max_length}; "
                "use a shorter prompt or a smaller --max_new_tokens"
            )

    def _padded(self, rows: Sequence[Sequence[int]], width: int, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
        padded_BP = np.zeros((len(rows), width), np.int32)
        for index, row in enumerate(rows):
            padded_BP[index, width - len(row) if left else 0 :][: len(row)] = row
        return padded_BP, np.array([len(row) for row in rows], np.int32)


def fill(prompt: str, answer: str) -> str:
    """Put the spans of a span-corruption answer into the gaps of its prompt; a gap without an answer stays.

    fill("a <extra_id_0> c", "<extra_id_0> b <extra_id_1>") -> "a  b  c": text is kept as the model wrote it.
    """
    return re.sub(r"<extra_id_\d+>", lambda gap: spans(answer).get(gap.group(), gap.group()), prompt)


def spans(answer: str) -> dict[str, str]:
    """The text behind each sentinel of an answer, the first time that it occurs."""
    _, *pieces = re.split(r"(<extra_id_\d+>)", answer)
    found: dict[str, str] = {}
    for sentinel, text in zip(pieces[::2], pieces[1::2], strict=True):
        found.setdefault(sentinel, text)
    return found
