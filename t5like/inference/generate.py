"""Text from a model: encode or read the prompt once, then one token at a time from the key-value cache.

`make_texts` is one jitted program on ids, which `decoding` tells what to choose; `Generator` puts a tokenizer around
it, for `prompting` (the command line), `answers`, and what a training run shows at its end. Prompts of a batch may
differ in length, and none depends on the others: neither its text nor its samples.
"""

import itertools
import re
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5like.config.schema import Config
from t5like.data.objectives.denoising import MODES
from t5like.data.objectives.masking import CLS, MASK
from t5like.data.sources.templates import render_prompt
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.data.tokenizers.vocabulary import DECODER_START_ID
from t5like.errors import ConfigError
from t5like.inference.sampling import DecodeOutput, DecodingOptions, SamplingParams, beam_search, sample
from t5like.model.masks import causal_mask, segment_mask
from t5like.model.stack import grow_cache, unstack_layers
from t5like.model.transformer import Transformer
from t5like.sharding import memory
from t5like.sharding.mesh import constrain
from t5like.sharding.placement import to_host
from t5like.types import Batch, Tree

STACKS = ("encoder", "decoder")
BUCKET = 32  # prompt lengths are padded up to a multiple, so that few shapes are compiled


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
    """Continue each prompt until one of `eos_ids` or for `max_new_tokens`: `make_texts` for one text a prompt.

    Returns:
        int32 ids [B, max_new_tokens], without the prompt; after the one that ended a text all 0.
    """
    numbers = SamplingParams(temperature=np.float32(temperature) if temperature else None)
    keys_B = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(prompt_BP.shape[0]))
    stops_E = np.array(eos_ids, np.int32)
    made = make_texts(
        config, params, prompt_BP, lengths_B, keys_B, stops_E, numbers, prefix_B, max_new_tokens=max_new_tokens
    )
    return made.ids_BGL[:, 0]


@partial(jax.jit, static_argnames=("config", "max_new_tokens", "texts", "beams", "top_k"))
def make_texts(
    config: Config,
    params: Tree,
    prompt_BP: jax.Array,
    lengths_B: jax.Array,
    keys_B: jax.Array,
    stops_E: jax.Array,
    numbers: SamplingParams,
    prefix_B: jax.Array | None = None,
    *,
    max_new_tokens: int,
    texts: int = 1,
    beams: bool = False,
    top_k: int = 0,
) -> DecodeOutput:
    """Encode or read the prompts, then make their texts token by token.

    Args:
        config: a settled one (no `auto`).
        params: the model's parameters, as they are or `unstacked_params`.
        prompt_BP: ids. Encoder-decoder: what the encoder reads, padded on the right. Decoder-only: the text to
            continue, padded on the left, at least one token each.
        lengths_B: real tokens of each prompt.
        keys_B: a random key for each prompt's samples.
        stops_E: the ids that end a text.
        numbers: settings that may change without compiling again.
        prefix_B: decoder-only: how many of each prompt's tokens see each other in both directions; None: none.
        max_new_tokens: at most so many tokens are made.
        texts: how many are made side by side: beams, or samples.
        beams: whether to search, instead of sampling or taking the likeliest.
        top_k: see `Decoding`.
    """
    params = unstacked_params(config, params)
    apply = partial(Transformer(config).apply, {"params": params})
    rows, width = prompt_BP.shape
    prompt_BP = constrain(prompt_BP, "batch", None)
    if config.model.architecture == "encoder_decoder":
        real_BP = (jnp.arange(width)[None] < lengths_B[:, None]).astype(jnp.int32)
        encoded_BSD = apply(prompt_BP, real_BP, method="encode")
        cache = apply(rows, 1, encoded_BSD, method="prepare_cache")
        cross_mask = segment_mask(jnp.ones((rows, 1), jnp.int32), real_BP)
        offset_B, fork, read_BP = jnp.zeros((rows,), jnp.int32), 1, jnp.full((rows, 1), DECODER_START_ID)
        decode = partial(apply, cross_mask_B1LS=cross_mask, method="decode")
        logits_B1V, cache = decode(read_BP, cache, 0)
    else:
        offset_B, fork, read_BP, decode = width - lengths_B, width, prompt_BP, partial(apply, method="decode")
        place_1P = jnp.arange(width)[None]
        visible_B1LS = causal_mask(width, width)
        if prefix_B is not None:
            visible_B1LS = visible_B1LS | (place_1P < (offset_B + prefix_B)[:, None])[:, None, None]
        visible_B1LS = visible_B1LS & (place_1P >= offset_B[:, None])[:, None, None]
        positions_BP = jnp.maximum(place_1P - offset_B[:, None], 0)
        cache = apply(rows, width, method="prepare_cache")
        logits_B1V, cache = decode(
            prompt_BP, cache, 0, positions_BL=positions_BP, mask_B1LS=visible_B1LS, last_only=True
        )
    steps = max(max_new_tokens - 1, 1)  # the last token is never read; but the loop is traced, even for one alone
    cache = grow_cache(cache, fork + steps * texts)
    place_1P = jnp.arange(fork)[None]
    real_BP = place_1P >= offset_B[:, None]

    def read(tokens_BG, step, ancestors_BGL, cache):
        branch_BGLG = ancestors_BGL[:, :, :steps, None] == jnp.arange(texts).reshape(1, 1, 1, -1)
        prompt_BGP = jnp.broadcast_to(real_BP[:, None], (rows, texts, fork))
        mask_BGS = jnp.concatenate([prompt_BGP, branch_BGLG.reshape(rows, texts, -1)], axis=2)
        positions_BG = jnp.broadcast_to((fork + step - offset_B)[:, None], (rows, texts))
        return decode(
            tokens_BG, cache, fork + step * texts, positions_BL=positions_BG, mask_B1LS=mask_BGS[:, None], fork=fork
        )

    seen_BV = None
    if numbers.repetition_penalty is not None:
        seen_BV = jnp.zeros((rows, config.vocab_rows), bool)
        seen_BV = seen_BV.at[jnp.arange(rows)[:, None], read_BP].max(real_BP)
    settings = {"stops_E": stops_E, "seen_BV": seen_BV, "numbers": numbers, "max_new_tokens": max_new_tokens}
    if beams:
        return beam_search(read, logits_B1V, cache, beams=texts, **settings)
    return sample(read, logits_B1V, cache, keys_B=keys_B, texts=texts, top_k=top_k, **settings)


@jax.jit
def row_keys(seed: jax.Array | int, rows_B: jax.Array) -> jax.Array:
    """A random key for each row, by its number."""
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(rows_B)


def unstacked_params(config: Config, params: Tree) -> Tree:
    """Parameters with a tree per layer where the layers are unrolled: slices in a loop would be copied in each turn."""
    if config.model.layers != "unroll":
        return params
    stacks = {
        name: {**params[name], "layers": unstack_layers(params[name]["layers"])} for name in STACKS if name in params
    }
    return {**params, **stacks}


@partial(jax.jit, static_argnames="config")
def likeliest(config: Config, params: Tree, batch: Batch) -> jax.Array:
    """What an encoder-only model says stands at each place: int32 [B, S]."""
    return Transformer(config).apply({"params": params}, batch).argmax(-1).astype(jnp.int32)


def eos_ids(config: Config, tokenizer: Tokenizer) -> tuple[int, ...]:
    """All ids that end a text, the tokenizer's own first: transformers stops at each id of its eos_token_id, too."""
    return tuple(dict.fromkeys((tokenizer.eos_id, *config.tokenizer.extra_eos_ids)))


class Prompt(NamedTuple):
    """A prompt as the model reads it.

    Attributes:
        ids: of the encoder's text, or of the text that a decoder-only model continues.
        prefix: how many of a decoder-only model's ids see each other in both directions.
    """

    ids: list[int]
    prefix: int = 0


class Answer(NamedTuple):
    """A text that a model made.

    Attributes:
        text: without what ended it.
        ids: the tokens, with the one that ended it (EOS, or the last of a text to stop at).
        log_prob: nats of all of them together, under the model as it is: no temperature, no penalty.
        token_log_probs: nats of each.
    """

    text: str
    ids: list[int]
    log_prob: float
    token_log_probs: list[float]


class Generator:
    """Prompts as text in, text out. Works on the mesh that the caller has set (`jax.set_mesh`)."""

    def __init__(self, config: Config, params: Tree, tokenizer: Tokenizer):
        """`config` is settled; `params` may be sharded."""
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self.eos_ids = eos_ids(config, tokenizer)
        self._unstacked: Tree = None

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
            return Prompt([DECODER_START_ID, *ids] if decoder_only else ids)
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
            return Prompt([*ids, DECODER_START_ID], len(ids))
        if tokenizer.bos_id is not None:  # a model from elsewhere has always seen it there
            ids = [tokenizer.bos_id, *ids]
        ids = ids or [tokenizer.eos_id]  # EOS stands between documents: it begins a new one
        return Prompt(ids, len(ids) if "prefix_lm" in objectives else 0)

    def answer(
        self, prompts: Sequence[Prompt], decoding: DecodingOptions, width: int = 1, rows: Sequence[int] | None = None
    ) -> list[list[Answer]]:
        """`decoding.num_returned` answers to each prompt, the best first.

        Args:
            prompts: see `prompt`.
            decoding: how.
            width: pad prompts at least to this length, so that calls share a compiled program.
            rows: numbers that with `decoding.seed` make each prompt's random key; default: 0, 1, ...

        Raises:
            ConfigError: a prompt or the answer is longer than the model's learned positions, or there are more beams
                than the vocabulary has tokens for.
        """
        stops = self._stops(decoding)
        made = self._make(prompts, decoding, width, rows)
        return [
            [
                self._answer(ids, log_p, stops, decoding.stop)
                for ids, log_p in zip(ids_GL.tolist(), log_p_GL.tolist(), strict=True)
            ][: decoding.num_returned]
            for ids_GL, log_p_GL in zip(made.ids_BGL, made.log_p_BGL, strict=True)
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
        """Ids of one text each: int32 [len(prompts), max_new_tokens], 0 after its end. `width` is as of `answer`."""
        decoding = DecodingOptions(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        return self._make(prompts, decoding, width, None).ids_BGL[:, 0]

    def room(self, prompts: Sequence[Prompt]) -> int:
        """The most new tokens that the model has positions for."""
        longest = max(len(prompt.ids) for prompt in prompts)
        return self.config.model.longest_text - (places(self.config, longest, 1) - 1 if self._decoder_only else 0)

    def check(self, prompt: Prompt, decoding: DecodingOptions) -> None:
        """Refuse what the model can't do.

        Raises:
            ConfigError: see `answer`.
        """
        self._check_length(places(self.config, len(prompt.ids), decoding.max_new_tokens))
        memory.check_texts(self.config, prompt=len(prompt.ids), new=decoding.max_new_tokens, texts=decoding.texts)
        most = self.config.tokenizer.vocab_size // (1 + len(self._stops(decoding)))
        if 1 < decoding.num_beams > most:
            raise ConfigError(
                f"--num_beams={decoding.num_beams} is too many for a vocabulary of "
                f"{self.config.tokenizer.vocab_size}; use at most --num_beams={most}"
            )

    @property
    def _decoder_only(self) -> bool:
        return self.config.model.architecture == "decoder"

    def _make(
        self, prompts: Sequence[Prompt], decoding: DecodingOptions, width: int, rows: Sequence[int] | None
    ) -> DecodeOutput:
        for prompt in prompts:
            self.check(prompt, decoding)
        count, mesh = len(prompts), jax.sharding.get_abstract_mesh()
        shards = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
        numbers = list(range(count) if rows is None else rows)
        spare = -count % shards  # each device gets the same number of rows
        prompts, numbers = [*prompts, *[prompts[0]] * spare], np.array(numbers + numbers[:1] * spare)
        width = -(-max(width, *(len(prompt.ids) for prompt in prompts)) // BUCKET) * BUCKET
        prompt_BP, lengths_B = self._padded([prompt.ids for prompt in prompts], width, left=self._decoder_only)
        if self._unstacked is None:
            unrolled = self.config.model.layers == "unroll"
            self._unstacked = jax.jit(partial(unstacked_params, self.config))(self.params) if unrolled else self.params
        made = make_texts(
            self.config,
            self._unstacked,
            prompt_BP,
            lengths_B,
            row_keys(np.uint32(decoding.seed), numbers),
            np.array(self._stops(decoding), np.int32),
            jax.tree.map(np.float32, decoding.numbers),
            np.array([prompt.prefix for prompt in prompts], np.int32),
            max_new_tokens=decoding.max_new_tokens,
            texts=decoding.texts,
            beams=decoding.num_beams > 1,
            top_k=decoding.top_k,
        )
        return jax.tree.map(lambda x: to_host(x)[:count], made)

    def _stops(self, decoding: DecodingOptions) -> list[int]:
        """Ids that end a text: `eos_ids`, and the sentinels among the texts to stop at; other texts are cut behind."""
        encoded = [self.tokenizer.encode_with_sentinels(text) for text in decoding.stop if "<extra_id_" in text]
        sentinels = {int(token) for token in self.tokenizer.sentinel_ids}
        return [*self.eos_ids, *(ids[0] for ids in encoded if len(ids) == 1 and ids[0] in sentinels)]

    def _answer(self, ids: list[int], log_p: list[float], ends: list[int], stop: Sequence[str]) -> Answer:
        decode = self.tokenizer.decode
        count = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
        whole = decode(ids[: count - 1] if ids[count - 1] in ends else ids[:count])
        if (text := until(whole, stop)) != whole:
            count = next(n for n in range(1, count + 1) if any(one in decode(ids[:n]) for one in stop))
        return Answer(text, ids[:count], float(np.sum(log_p[:count])), log_p[:count])

    def texts(self, ids_BL: np.ndarray) -> list[str]:
        """Generated ids as text, up to what ends it: what is behind that is padding, whatever its id means."""
        goes_on = lambda token: token not in self.eos_ids
        return [self.tokenizer.decode(itertools.takewhile(goes_on, row.tolist())) for row in ids_BL]

    def likeliest(self, batch: Batch) -> np.ndarray:
        """An encoder-only model's guess at each place of a batch's rows: int32 [B, S]."""
        return to_host(likeliest(self.config, self.params, batch))

    def _unmask(self, prompt: str) -> str:
        tokenizer = self.tokenizer
        mask, cls = (int(tokenizer.sentinel_ids[number]) for number in (MASK, CLS))
        row = [cls, *tokenizer.encode_with_sentinels(prompt), tokenizer.eos_id]
        self._check_length(places(self.config, len(row), 0))
        ids_1S, lengths_1 = self._padded([row], -(-len(row) // BUCKET) * BUCKET, left=False)
        real_1S = (np.arange(ids_1S.shape[1])[None] < lengths_1[:, None]).astype(np.int32)
        said = self.likeliest(Batch(None, ids_1S, real_1S.astype(np.float32), ids_1S, real_1S))[0]
        return tokenizer.decode([int(said[i]) if token == mask else token for i, token in enumerate(row)][1:-1])

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


def until(text: str, stop: Sequence[str]) -> str:
    """A text up to where the first of the stop texts begins; an empty one stops nothing."""
    return text[: min((place for end in stop if end and (place := text.find(end)) >= 0), default=len(text))]


def places(config: Config, prompt: int, new: int) -> int:
    """Positions that a prompt and its answer take, of the stack that needs more; lengths in tokens.

    A decoder-only model has both in one text, whose last token is never read. An encoder-only model has no answer.
    """
    return {"decoder": prompt + new - 1, "encoder": prompt}.get(config.model.architecture, max(prompt, new))
