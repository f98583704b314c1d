"""Decoding compared with Hugging Face transformers (golden/generate.npz) and with brute force."""

import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import model_of, params_of

from t5like.inference.beam_search import beam_search
from t5like.inference.decoding import decode_texts, row_keys
from t5like.inference.sampling import TracedOptions, largest, log_p_of, penalize, sample, warp

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "generate.npz")
NEW = 12


@functools.cache
def family(name: str):
    """A resolved config and the golden weights."""
    _, config = model_of(name)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, kernels="plain"))
    return config, jax.tree.map(jnp.asarray, params_of(name))


def decode(name, ids_BP, lengths_B, *, eos, num_beams=1, **traced):
    config, params = family(name)
    traced = {"length_penalty": 1.0, "repetition_penalty": None, **traced}
    return decode_texts(
        config,
        params,
        ids_BP.astype(np.int32),
        lengths_B.astype(np.int32),
        row_keys(0, np.arange(len(ids_BP))),
        np.array([eos], np.int32).reshape(-1),
        TracedOptions(**{key: None if value is None else np.float32(value) for key, value in traced.items()}),
        max_new_tokens=NEW,
        num_texts=num_beams,
        use_beams=num_beams > 1,
    )


def golden_ids(key: str, eos) -> np.ndarray:
    """Hugging Face pads beams with EOS after EOS; t5like with 0."""
    ids = GOLDEN[f"{key}.ids"]
    ends = np.isin(ids, eos)
    ended = np.cumsum(ends, axis=-1) - ends > 0
    return np.where(ended, 0, ids)


@pytest.mark.parametrize("name", ["t5_1_1", "llama", "gpt2"])
def test_texts_and_scores_equal_those_of_hugging_face(name):
    prompts, lengths = GOLDEN[f"{name}.prompts"], GOLDEN[f"{name}.lengths"]
    searches = {
        **({} if name == "gpt2" else {"greedy": {}}),
        "beams 0.6": {"num_beams": 4, "length_penalty": 0.6},
        "beams 1": {"num_beams": 4, "length_penalty": 1.0},
        "beams 2": {"num_beams": 4, "length_penalty": 2.0},
    }
    ends = set()
    for (what, settings), (end, eos) in itertools.product(
        searches.items(), {"eos": int(GOLDEN[f"{name}.eos"]), "free": -1}.items()
    ):
        output = decode(name, prompts, lengths, eos=eos, **settings)
        wanted = golden_ids(f"{name}.{what}.{end}", eos)
        np.testing.assert_array_equal(output.ids_BGL, wanted, err_msg=f"{what} {end}")
        if settings:
            np.testing.assert_allclose(output.scores_BG, GOLDEN[f"{name}.{what}.{end}.scores"], rtol=1e-4)
        ends |= {int(length) for length in (wanted != 0).sum(-1).ravel()}
    assert len(ends) >= 3  # texts ended early, at several lengths


def test_beams_with_several_eos_ids_equal_those_of_hugging_face():
    prompts, lengths, eos = (GOLDEN[f"llama.{what}"] for what in ("prompts", "lengths", "several"))
    last = set()
    for penalty in (0.6, 1, 2):
        output = decode("llama", prompts, lengths, eos=eos, num_beams=4, length_penalty=float(penalty))
        wanted = golden_ids(key := f"llama.beams {penalty}.several", eos)
        np.testing.assert_array_equal(output.ids_BGL, wanted, err_msg=key)
        np.testing.assert_allclose(output.scores_BG, GOLDEN[f"{key}.scores"], rtol=1e-4)
        last |= set(eos) & set(wanted.ravel())
    assert last == set(eos)


def test_penalized_beams_equal_those_of_hugging_face():
    prompts, lengths, eos = (GOLDEN[f"t5_1_1.{what}"] for what in ("prompts", "lengths", "eos"))
    output = decode("t5_1_1", prompts, lengths, eos=int(eos), num_beams=4, repetition_penalty=1.7)
    np.testing.assert_array_equal(output.ids_BGL, golden_ids("t5_1_1.beams penalized.eos", int(eos)))


def test_logits_are_processed_as_in_hugging_face():
    logits = jnp.asarray(GOLDEN["logits"])
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, GOLDEN["seen"], True, axis=1)
    penalized = penalize(logits, seen, 1.4)
    processed = {
        "top_k": warp(logits, TracedOptions(temperature=1.0), 7),
        "top_p": warp(logits, TracedOptions(temperature=1.0, top_p=0.8)),
        "min_p": warp(logits, TracedOptions(temperature=1.0, min_p=0.1)),
        "repetition_penalty": penalized,
        "all": warp(penalized, TracedOptions(temperature=0.7, top_p=0.9, min_p=0.05), 40),
    }
    for name, values in processed.items():
        np.testing.assert_allclose(values, GOLDEN[f"processed.{name}"], rtol=1e-6, err_msg=name)
    assert {int(np.isfinite(processed[name]).sum(1).min()) for name in ("top_k", "all")} != {200}


# ---- A model that is a table: logits depend only on the last token ----

V, END = 6, 1
PADDED = 64  # vocabulary rows; those from V on are masked padding
TABLE = np.full((PADDED, PADDED), -1e9, np.float32)
TABLE[:V, :V] = np.random.default_rng(7).normal(0, 1.5, (V, V))
TABLE = jnp.asarray(TABLE)


def decode_step(tokens_BG, step, ancestors_BGL, cache):
    return TABLE[tokens_BG], cache


def enumerated(new: int) -> list[tuple[float, tuple[int, ...]]]:
    """Every text that ends with END or has `new` tokens, with its log-probability."""
    log_p = np.asarray(jax.nn.log_softmax(TABLE))
    texts, open_ = [], [(0.0, ())]
    while open_:
        score, text = open_.pop()
        if text and (text[-1] == END or len(text) == new):
            texts.append((score, text))
            continue
        last = text[-1] if text else 2  # the prompt's
        open_ += [(score + log_p[last, token], (*text, token)) for token in range(V)]
    return texts


def test_a_beam_search_with_enough_beams_finds_the_most_likely_texts():
    search = functools.partial(beam_search, decode_step, seen_BV=None, max_new_tokens=3, num_beams=30)
    traced = TracedOptions(length_penalty=0.0)  # a longer text is never better, so that early stopping loses nothing
    output = jax.jit(search)(TABLE[2][None, None], None, stop_ids_E=jnp.array([END]), traced=traced)
    wanted = sorted(enumerated(3), reverse=True)[:30]
    np.testing.assert_allclose(output.scores_BG[0], [score for score, _ in wanted], rtol=1e-5)
    assert [tuple(ids[: len(text)]) for ids, (_, text) in zip(output.ids_BGL[0].tolist(), wanted, strict=True)] == [
        text for _, text in wanted
    ]
    np.testing.assert_allclose(output.log_p_BGL.sum(-1), output.scores_BG, rtol=1e-5)


def test_samples_of_a_row_depend_only_on_its_key_and_follow_the_distribution():
    @functools.partial(jax.jit, static_argnames="texts")
    def draw(keys, texts=1):
        logits = jnp.broadcast_to(TABLE[2], (len(keys), 1, PADDED))
        return sample(
            decode_step,
            logits,
            None,
            keys_B=keys,
            stop_ids_E=jnp.array([END]),
            seen_BV=None,
            traced=TracedOptions(temperature=np.float32(1.0)),
            max_new_tokens=2,
            num_texts=texts,
            top_k=0,
        )

    keys = row_keys(5, np.arange(3000))
    output = draw(keys)
    np.testing.assert_array_equal(draw(keys[7:9]).ids_BGL, output.ids_BGL[7:9])
    several = draw(keys[:2], texts=3).ids_BGL
    np.testing.assert_array_equal(several[:, 0], output.ids_BGL[:2, 0])
    counts = {}
    for ids in output.ids_BGL[:, 0].tolist():
        counts[tuple(ids)] = counts.get(tuple(ids), 0) + 1
    for score, text in enumerated(2):
        wanted = 3000 * np.exp(score)
        assert abs(counts.get((*text, 0)[:2], 0) - wanted) < 5 * wanted**0.5 + 1, text


def test_the_largest_values_are_those_of_a_sort(rng):
    x = rng.integers(0, 500, (3, 2, 4000)).astype(np.float32)  # with many equal ones
    for count in (1, 5):
        values, indices = largest(jnp.asarray(x), count)
        order = np.argsort(-x, axis=-1, kind="stable")[..., :count]
        np.testing.assert_array_equal(indices, order)
        np.testing.assert_array_equal(values, np.take_along_axis(x, order, -1))


def test_log_probabilities_are_those_of_the_softmax(rng):
    logits = rng.normal(0, 3, (4, 50)).astype(np.float32)
    tokens = rng.integers(0, 50, 4)
    wanted = np.log(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[np.arange(4), tokens]
    np.testing.assert_allclose(log_p_of(jnp.asarray(logits), jnp.asarray(tokens)), wanted, rtol=1e-5)
