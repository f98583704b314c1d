"""Text from a model: encode or read the prompt once, then one token at a time from the key-value cache.

`generate` is one jitted program on ids; `Generator` puts a tokenizer around it, for the command line and for what a
training run shows at its end. Greedy, or sampled with a temperature. Prompts of a batch may differ in length.
"""

import re
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from t5like.config import Config
from t5like.data.objectives import START
from t5like.data.tokenizer import Tokenizer
from t5like.errors import ConfigError
from t5like.model.attention import causal_mask, segment_mask
from t5like.model.transformer import Transformer
from t5like.types import Tree

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
        visible_B1LS = causal_mask(width, length) & (key_1S >= offset_B[:, None])[:, None, None]
        if config.data.objective == "prefix_lm":  # a prompt is a prefix: seen in both directions, as in training
            visible_B1LS = ((key_1S < width) & (key_1S >= offset_B[:, None]))[:, None, None]
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


class Generator:
    """Prompts as text in, text out."""

    def __init__(self, config: Config, params: Tree, tokenizer: Tokenizer):
        """`config` is settled; `params` may be sharded."""
        self.config, self.params, self.tokenizer = config, params, tokenizer

    def __call__(
        self, prompts: Sequence[str], *, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """What the model says to each prompt. A model trained on span corruption reads <extra_id_N> as a gap to fill.

        Raises:
            ConfigError: a prompt or the answer is longer than the model's learned positions.
        """
        tokenizer, decoder_only = self.tokenizer, self.config.model.architecture == "decoder"
        rows = [tokenizer.encode_with_sentinels(prompt) for prompt in prompts]
        if decoder_only:
            rows = [row or [tokenizer.eos_id] for row in rows]  # EOS stands between documents: it begins a new one
        elif self.config.data.objective == "span_corruption":
            rows = [[*row, tokenizer.eos_id] for row in rows]
        return [
            tokenizer.decode(ids)
            for ids in self.ids(rows, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        ]

    def ids(
        self, rows: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> np.ndarray:
        """The same on ids: int32 [len(rows), max_new_tokens], 0 after EOS."""
        width = -(-max(max(map(len, rows)), 1) // BUCKET) * BUCKET
        model = self.config.model
        longest = width + max_new_tokens if model.architecture == "decoder" else max(width, max_new_tokens)
        if model.positions == "learned" and longest > model.max_length:
            raise ConfigError(
                f"a text of {longest} tokens does not fit model.max_length={model.max_length}; "
                "use a shorter prompt or a smaller --max_new_tokens"
            )
        prompt_BP = np.zeros((len(rows), width), np.int32)
        for index, row in enumerate(rows):
            if model.architecture == "decoder":
                prompt_BP[index, width - len(row) :] = row
            else:
                prompt_BP[index, : len(row)] = row
        lengths_B = np.array([len(row) for row in rows], np.int32)
        ids = generate(
            self.config,
            self.params,
            prompt_BP,
            lengths_B,
            jax.random.key(seed),
            max_new_tokens=max_new_tokens,
            eos=self.tokenizer.eos_id,
            temperature=np.float32(temperature),
        )
        return np.asarray(ids)


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
