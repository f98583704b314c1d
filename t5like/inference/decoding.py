"""The compiled decoding program: encode or prefill the prompts, then decode token by token with a key-value cache.

`decode_texts` is one jitted function of token ids. `inference.sampling` chooses the tokens; `inference.generate` puts a
tokenizer around it. The prompts of a batch may differ in length, and no prompt influences the text or the samples of
another.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5like.config.schema import Config
from t5like.data.tokenizers.vocabulary import DECODER_START_ID
from t5like.inference.beam_search import beam_search
from t5like.inference.sampling import DecodeOutput, DecodeStep, TracedOptions, sample
from t5like.model.cache import grow_cache
from t5like.model.masks import causal_mask, segment_mask
from t5like.model.stack import unstack_layers
from t5like.model.transformer import Transformer
from t5like.sharding.logical_axes import constrain
from t5like.types import Batch, Tree

STACKS = ("encoder", "decoder")


def generate(
    config: Config,
    params: Tree,
    prompt_BP: jax.Array,
    lengths_B: jax.Array,
    key: jax.Array,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    prefix_B: jax.Array | None = None,
    temperature: float = 0.0,
) -> jax.Array:
    """Generate one text per prompt, until one of `eos_ids` or for `max_new_tokens`.

    Returns:
        int32 ids [B, max_new_tokens], without the prompt; all 0 after the id that ended a text.
    """
    traced = TracedOptions(temperature=np.float32(temperature) if temperature else None)
    keys_B = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(prompt_BP.shape[0]))
    stop_ids_E = np.array(eos_ids, np.int32)
    output = decode_texts(
        config, params, prompt_BP, lengths_B, keys_B, stop_ids_E, traced, prefix_B, max_new_tokens=max_new_tokens
    )
    return output.ids_BGL[:, 0]


@partial(jax.jit, static_argnames=("config", "max_new_tokens", "num_texts", "use_beams", "top_k", "sampled_log_p"))
def decode_texts(
    config: Config,
    params: Tree,
    prompt_BP: jax.Array,
    lengths_B: jax.Array,
    keys_B: jax.Array,
    stop_ids_E: jax.Array,
    traced: TracedOptions,
    prefix_B: jax.Array | None = None,
    *,
    max_new_tokens: int,
    num_texts: int = 1,
    use_beams: bool = False,
    top_k: int = 0,
    sampled_log_p: bool = False,
) -> DecodeOutput:
    """Encode or prefill the prompts, then decode their texts token by token.

    Args:
        config: a resolved config (no `auto`).
        params: the model's parameters, stacked or as `unstack_params` returns them.
        prompt_BP: ids. Encoder-decoder: the encoder's input, padded on the right. Decoder-only: the text to continue,
            padded on the left, at least one token each.
        lengths_B: number of tokens of each prompt without padding.
        keys_B: a random key for the samples of each prompt.
        stop_ids_E: the ids that end a text.
        traced: the options that may change without recompilation.
        prefix_B: decoder-only: how many tokens of each prompt attend to each other in both directions; None: none.
        max_new_tokens: upper limit of new tokens.
        num_texts: texts per prompt that are decoded in parallel: beams or samples.
        use_beams: whether to run a beam search, instead of sampling or greedy decoding.
        top_k: see `DecodingOptions`.
        sampled_log_p: see `sampling.sample`.
    """
    params = unstack_params(config, params)
    apply = partial(Transformer(config).apply, {"params": params})
    rows = prompt_BP.shape[0]
    prompt_BP = constrain(prompt_BP, "batch", None)
    encoder_decoder = config.model.architecture == "encoder_decoder"
    prefill = (_encode if encoder_decoder else _prefill)(apply, prompt_BP, lengths_B, prefix_B)
    steps = max(max_new_tokens - 1, 1)  # the last token is never an input; the loop is traced even for a single token
    cache = grow_cache(prefill.cache, prefill.branch_start + steps * num_texts)
    decode_step = _decode_step(prefill, rows, num_texts, steps)
    seen_BV = None
    if traced.repetition_penalty is not None:
        seen_BV = jnp.zeros((rows, config.vocab_rows), bool)
        seen_BV = seen_BV.at[jnp.arange(rows)[:, None], prefill.ids_BP].max(prefill.is_prompt_BP)
    options = {"stop_ids_E": stop_ids_E, "seen_BV": seen_BV, "traced": traced, "max_new_tokens": max_new_tokens}
    if use_beams:
        return beam_search(decode_step, prefill.logits_B1V, cache, num_beams=num_texts, **options)
    options |= {"keys_B": keys_B, "num_texts": num_texts, "top_k": top_k, "sampled_log_p": sampled_log_p}
    return sample(decode_step, prefill.logits_B1V, cache, **options)


class _Prefill(NamedTuple):
    """A batch of prompts after the first forward pass of the decoder.

    Attributes:
        decode: `Transformer.decode` on one or more further tokens.
        ids_BP: the ids that the decoder has as input so far.
        offset_B: padding at the left of each row of `ids_BP`.
        branch_start: cache index of the first new token; from there on the texts of a prompt differ.
        logits_B1V: after the last input id.
        cache: the decoder's key-value cache.
    """

    decode: Callable[..., tuple[jax.Array, Any]]
    ids_BP: jax.Array
    offset_B: jax.Array
    branch_start: int
    logits_B1V: jax.Array
    cache: Any

    @property
    def is_prompt_BP(self) -> jax.Array:
        """Which of `ids_BP` are not padding."""
        return jnp.arange(self.branch_start)[None] >= self.offset_B[:, None]


def _encode(apply: Callable, prompt_BP: jax.Array, lengths_B: jax.Array, _: None) -> _Prefill:
    """Encode the prompts of an encoder-decoder, and decode its start token."""
    rows, width = prompt_BP.shape
    is_prompt_BP = (jnp.arange(width)[None] < lengths_B[:, None]).astype(jnp.int32)
    encoded_BSD = apply(prompt_BP, is_prompt_BP, method="encode")
    cache = apply(rows, 1, encoded_BSD, method="prepare_cache")
    cross_mask = segment_mask(jnp.ones((rows, 1), jnp.int32), is_prompt_BP)
    start_B1 = jnp.full((rows, 1), DECODER_START_ID)
    decode = partial(apply, cross_mask_B1LS=cross_mask, method="decode")
    logits_B1V, cache = decode(start_B1, cache, 0)
    return _Prefill(decode, start_B1, jnp.zeros((rows,), jnp.int32), 1, logits_B1V, cache)


def _prefill(apply: Callable, prompt_BP: jax.Array, lengths_B: jax.Array, prefix_B: jax.Array | None) -> _Prefill:
    """Prefill the cache of a decoder-only model with the prompts."""
    rows, width = prompt_BP.shape
    offset_B, decode = width - lengths_B, partial(apply, method="decode")
    index_1P = jnp.arange(width)[None]
    mask_B1LS = causal_mask(width, width)
    if prefix_B is not None:
        mask_B1LS = mask_B1LS | (index_1P < (offset_B + prefix_B)[:, None])[:, None, None]
    mask_B1LS = mask_B1LS & (index_1P >= offset_B[:, None])[:, None, None]
    positions_BP = jnp.maximum(index_1P - offset_B[:, None], 0)
    cache = apply(rows, width, method="prepare_cache")
    logits_B1V, cache = decode(prompt_BP, cache, 0, positions_BL=positions_BP, mask_B1LS=mask_B1LS, last_only=True)
    return _Prefill(decode, prompt_BP, offset_B, width, logits_B1V, cache)


def _decode_step(prefill: _Prefill, rows: int, num_texts: int, steps: int) -> DecodeStep:
    """A function that runs the decoder on one more token of each text: G texts of a prompt are G queries of one row."""
    is_prompt_BP = prefill.is_prompt_BP

    def decode_step(tokens_BG, step, ancestors_BGL, cache):
        is_own_BGLG = ancestors_BGL[:, :, :steps, None] == jnp.arange(num_texts).reshape(1, 1, 1, -1)
        prompt_mask_BGP = jnp.broadcast_to(is_prompt_BP[:, None], (rows, num_texts, prefill.branch_start))
        mask_BGS = jnp.concatenate([prompt_mask_BGP, is_own_BGLG.reshape(rows, num_texts, -1)], axis=2)
        positions_BG = jnp.broadcast_to((prefill.branch_start + step - prefill.offset_B)[:, None], (rows, num_texts))
        return prefill.decode(
            tokens_BG,
            cache,
            prefill.branch_start + step * num_texts,
            positions_BL=positions_BG,
            mask_B1LS=mask_BGS[:, None],
            branch_start=prefill.branch_start,
        )

    return decode_step


@jax.jit
def row_keys(seed: jax.Array | int, rows_B: jax.Array) -> jax.Array:
    """A random key for each row, derived from the seed and the row's number."""
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(rows_B)


def unstack_params(config: Config, params: Tree) -> Tree:
    """Parameters with one tree per layer where layers are unrolled: slices in the loop would be copied at each step."""
    if config.model.layers != "unroll":
        return params
    stacks = {
        name: {**params[name], "layers": unstack_layers(params[name]["layers"])} for name in STACKS if name in params
    }
    return {**params, **stacks}


@partial(jax.jit, static_argnames="config")
def predict_tokens(config: Config, params: Tree, batch: Batch) -> jax.Array:
    """The most likely token at each position of an encoder-only model: int32 [B, S]."""
    return Transformer(config).apply({"params": params}, batch).argmax(-1).astype(jnp.int32)
