"""Cached decoding compared with the full forward pass; stopping, sampling, infilling, prompts."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from conftest import small
from model_variants import params_of

from t5like.data.tokenizers.tokenizer import Tokenizer, train_tokenizer
from t5like.errors import ConfigError
from t5like.inference.decoding import decode_texts, generate, row_keys
from t5like.inference.generate import Generator, truncate_at_stop
from t5like.inference.infilling import fill, spans
from t5like.inference.prompt_format import Prompt
from t5like.inference.sampling import DecodingOptions, TracedOptions
from t5like.model.transformer import Transformer
from t5like.optim.eval_step import jit_eval_step
from t5like.sharding import auto
from t5like.sharding import mesh as meshes
from t5like.types import Batch

NEW = 6  # tokens
SHAPES = {
    "encoder_decoder": {},
    "relative decoder": {"model": {"architecture": "decoder"}},
    "rotary decoder": {"model": {"architecture": "decoder", "positions": "rotary", "num_kv_heads": 2}},
    "learned decoder": {"model": {"architecture": "decoder", "positions": "learned"}},
    "prefix decoder": {"model": {"architecture": "decoder"}, "data": {"objective": "prefix_lm"}},
    "scanned encoder_decoder": {"model": {"layers": "scan", "num_layers": 2}},
    "windowed decoder": {"model": {"architecture": "decoder", "attention_window": 3}},
    "umt5 encoder_decoder": {"model": {"relative_bias": "per_layer", "num_layers": 2}},
}


DECODER = SHAPES["relative decoder"]  # compiles in half the time


def model_of(**sections):
    """A resolved config and random parameters; a large head, so that no two tokens are about equally likely."""
    config = small(**{**sections, "model": {"num_layers": 1, **sections.get("model", {})}})
    mesh = meshes.make_mesh(config, jax.devices()[:1])
    config = auto.resolve_auto(config, mesh)
    params = params_of(config, seed=1)
    return config, {**params, "head": params["head"] * 10}


def prompts_of(config, lengths: list[int]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Random prompts as a padded batch for `generate`, and as separate rows."""
    rng = np.random.default_rng(5)
    rows = [rng.integers(3, 480, length).astype(np.int32) for length in lengths]
    left = config.model.architecture == "decoder"
    return np.stack([np.pad(row, (16 - len(row), 0) if left else (0, 16 - len(row))) for row in rows]), rows


def decode(config, params, lengths, *, seed=0, eos=(1,), **options):
    prompt_BP, rows = prompts_of(config, lengths)
    if "prefix_lm" in config.data.objective:
        options["prefix_B"] = np.array(lengths, np.int32)
    ids = generate(
        config,
        params,
        prompt_BP,
        np.array(lengths, np.int32),
        jax.random.key(seed),
        max_new_tokens=NEW,
        eos_ids=eos,
        **options,
    )
    return np.asarray(ids), rows


@partial(jax.jit, static_argnums=0)
def forward(config, params, batch):
    return Transformer(config).apply({"params": params}, batch)


def full_logits(config, params, prompt, answer):
    """Logits [tokens of the answer, V] of one unpadded row in one forward pass, as in training."""
    if config.model.architecture == "encoder_decoder":
        decoder = np.array([0, *answer[:-1]], np.int32)
        batch = Batch(decoder[None], decoder[None], np.ones((1, len(decoder)), np.float32), prompt[None])
        return np.asarray(forward(config, params, batch))[0]
    row = np.array([*prompt, *answer[:-1]], np.int32)
    prefix = None if "causal_lm" in config.data.objective else (np.arange(len(row)) < len(prompt))[None]
    batch = Batch(row[None], row[None], np.ones((1, len(row)), np.float32), prefix_BL=prefix)
    return np.asarray(forward(config, params, batch))[0, len(prompt) - 1 :]


@pytest.mark.parametrize("shape", list(SHAPES)[:6])  # the others: with beams
def test_greedy_decoding_takes_the_argmax_of_the_full_forward_pass(shape):
    config, params = model_of(**SHAPES[shape])
    answers, prompts = decode(config, params, [3, 16, 3], eos=[499])
    assert len(np.unique(answers)) > 5
    for prompt, answer in zip(prompts, answers, strict=True):
        np.testing.assert_array_equal(full_logits(config, params, prompt, answer).argmax(-1), answer)


@pytest.mark.parametrize("shape", ["scanned encoder_decoder", "windowed decoder", "umt5 encoder_decoder"])
def test_log_probabilities_of_beams_are_those_of_the_full_forward_pass(shape):
    config, params = model_of(**SHAPES[shape])
    lengths = [3, 16, 3]
    prompt_BP, prompts = prompts_of(config, lengths)
    output = decode_texts(
        config,
        params,
        prompt_BP,
        np.array(lengths, np.int32),
        row_keys(0, np.arange(3)),
        np.array([499], np.int32),
        TracedOptions(length_penalty=np.float32(1)),
        max_new_tokens=NEW,
        num_texts=3,
        use_beams=True,
    )
    for prompt, ids_GL, log_p_GL, scores_G in zip(prompts, *map(np.asarray, output), strict=True):
        assert len({tuple(ids) for ids in ids_GL.tolist()}) == 3 and (np.diff(scores_G) <= 0).all()
        for ids, log_p in zip(ids_GL, log_p_GL, strict=True):
            wanted = jax.nn.log_softmax(full_logits(config, params, prompt, ids))[np.arange(NEW), ids]
            np.testing.assert_allclose(log_p, wanted, rtol=1e-4, atol=1e-5)


def test_a_single_token_can_have_several_beams():
    config, params = model_of(**DECODER)
    prompt_BP, [prompt] = prompts_of(config, [9])
    numbers = TracedOptions(length_penalty=np.float32(1))
    settings = row_keys(0, np.arange(1)), np.array([499], np.int32), numbers
    output = decode_texts(
        config, params, prompt_BP, np.array([9]), *settings, max_new_tokens=1, num_texts=4, use_beams=True
    )
    best = np.argsort(-np.asarray(full_logits(config, params, prompt, [0])[0]))[:4]
    np.testing.assert_array_equal(output.ids_BGL[0, :, 0], best)


@pytest.mark.parametrize("shape", ["encoder_decoder", "rotary decoder"])
def test_a_row_ends_with_any_eos_id_and_other_rows_continue(shape):
    config, params = model_of(**SHAPES[shape])
    free, _ = decode(config, params, [3, 16, 9], eos=[499, 498])
    ends = [int(free[0, 2]), int(free[1, 3])]
    assert not np.isin(ends, [*free[0, :2], *free[1, :3], *free[2]]).any()
    answers, _ = decode(config, params, [3, 16, 9], eos=ends)
    np.testing.assert_array_equal(answers, [[*free[0, :3], 0, 0, 0], [*free[1, :4], 0, 0], free[2]])


def test_sampling_depends_only_on_the_seed():
    config, params = model_of(**DECODER)
    once, again, other = (decode(config, params, [3, 16], seed=seed, temperature=1.0)[0] for seed in (3, 3, 4))
    np.testing.assert_array_equal(once, again)
    assert (once != other).any(1).all()
    np.testing.assert_array_equal(
        decode(config, params, [3, 16], temperature=1e-4)[0], decode(config, params, [3, 16], seed=9)[0]
    )


def test_samples_are_distributed_as_the_softmax_at_the_temperature():
    config, params = model_of()
    prompt_BP, rows = prompts_of(config, [9])
    many = np.repeat(prompt_BP, 4000, axis=0)
    drawn = generate(
        config,
        params,
        many,
        np.full(4000, 9, np.int32),
        jax.random.key(0),
        max_new_tokens=1,
        eos_ids=[1],
        temperature=0.7,
    )
    drawn = np.asarray(drawn)[:, 0]
    scores = np.float64(full_logits(config, params, rows[0], [0])[0]) / 0.7
    log_p = scores - np.logaddexp.reduce(scores)
    wanted = np.sum(np.exp(log_p) * log_p)
    assert abs(log_p[drawn].mean() - wanted) < 4 * log_p[drawn].std() / 4000**0.5
    assert len(np.unique(drawn)) > 20


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory):
    config = small(tokenizer={"vocab_size": 400, "num_sentinels": 20})
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer((texts / "a.txt").read_text().splitlines(), config.tokenizer, path)
    return Tokenizer.load(path, num_sentinels=20)


def test_runs_of_one_model_share_their_programs_for_text_and_evaluation(tokenizer):
    vocabulary = {**DECODER, "tokenizer": {"vocab_size": 400, "num_sentinels": 20}}
    config, params = model_of(**vocabulary)
    other = {"seed": 3, "train": {"num_steps": 7}, "optimizer": {"name": "lion"}, "data": {"source": "text:other.txt"}}
    first, second = config, model_of(**vocabulary, **other)[0]
    ids_of = lambda each: Generator(each, params, tokenizer).ids([Prompt([5, 6, 1])], max_new_tokens=2)
    ids, programs = ids_of(first), decode_texts._cache_size()
    assert (ids_of(second) == ids).all() and decode_texts._cache_size() == programs
    mesh = meshes.make_mesh(config, jax.devices()[:1])
    assert jit_eval_step(first, mesh) is jit_eval_step(second, mesh)
    assert jit_eval_step(first, mesh) is not jit_eval_step(model_of(**vocabulary, train={"z_loss": 0.1})[0], mesh)


def test_the_text_of_a_prompt_does_not_depend_on_other_prompts(tokenizer):
    for shape in ("encoder_decoder", "relative decoder"):
        config, params = model_of(**SHAPES[shape], tokenizer={"vocab_size": 400, "num_sentinels": 20})
        generator = Generator(config, params, tokenizer)
        prompts = ["the <extra_id_0> b", "", "a much longer prompt that fills more than one bucket of 32 tokens " * 2]
        together = generator(prompts, max_new_tokens=NEW)
        assert together == [generator([prompt], max_new_tokens=NEW)[0] for prompt in prompts]
        assert len(set(together)) > 1


def test_extra_eos_ids_of_the_config_end_texts_and_are_not_part_of_them(tokenizer):
    config, params = model_of(tokenizer={"vocab_size": 400, "num_sentinels": 20})
    [answer] = Generator(config, params, tokenizer).answer([Prompt([20, 21, 1])], DecodingOptions(NEW))[0]
    end = answer.ids[3]
    assert end not in answer.ids[:3]
    ending = dataclasses.replace(config.tokenizer, extra_eos_ids=(end, 399, end))
    generator = Generator(dataclasses.replace(config, tokenizer=ending), params, tokenizer)
    assert generator.eos_ids == (tokenizer.eos_id, end, 399)
    [ended] = generator.answer([Prompt([20, 21, 1])], DecodingOptions(NEW))[0]
    assert ended.ids == answer.ids[:4] and ended.text == tokenizer.decode(answer.ids[:3])
    assert ended.log_prob == pytest.approx(sum(answer.token_log_probs[:4]), rel=1e-5)
    ids = generator.ids([Prompt([20, 21, 1])], max_new_tokens=NEW)
    assert ids.tolist() == [[*answer.ids[:4], 0, 0]] and generator.texts(ids) == [ended.text]


def test_a_text_longer_than_the_learned_positions_is_refused(tokenizer):
    config, params = model_of(model={"architecture": "decoder", "positions": "learned", "max_length": 48})
    generator = Generator(config, params, tokenizer)
    prompt = Prompt([3] * 30)  # padded to 32, which does not count
    with pytest.raises(ConfigError, match=r"a text of 49 tokens does not fit model.max_length=48"):
        generator.ids([prompt], max_new_tokens=20)
    assert generator.ids([prompt], max_new_tokens=19).shape == (1, 19)  # the last token is never an input


def test_sentinels_of_a_prompt_are_replaced_by_the_spans_of_the_answer():
    answer = "<extra_id_0> b c<extra_id_1>\n<extra_id_0>again<extra_id_2>"
    assert spans(answer) == {"<extra_id_0>": " b c", "<extra_id_1>": "\n", "<extra_id_2>": ""}
    assert fill("a<extra_id_0> d<extra_id_1>e", answer) == "a b c d\ne"
    assert fill("a <extra_id_7> \\1 b", answer) == "a <extra_id_7> \\1 b"
    assert fill("a <extra_id_0>", r"<extra_id_0>\g<0>") == r"a \g<0>"
    assert fill("plain", "") == "plain" and spans("no sentinel") == {}


# ---- Prompts ----


def generator_of(tokenizer, architecture="encoder_decoder", **data):
    config = small(model={"architecture": architecture}, data=data, tokenizer={"vocab_size": 400, "num_sentinels": 64})
    return Generator(config, None, tokenizer)


def test_prompts_have_the_format_of_the_objectives(tokenizer):
    ids, eos = tokenizer.encode("ba de"), tokenizer.eos_id
    mode = [int(tokenizer.sentinel_ids[-2])]
    cases = [
        (("encoder_decoder", "span_corruption"), "ba de", Prompt([*ids, eos])),
        (("decoder", "span_corruption"), "ba de", Prompt([*ids, eos, 0], len(ids) + 1)),
        (("encoder_decoder", "prefix_lm"), "ba de", Prompt(ids)),
        (("decoder", "prefix_lm"), "ba de", Prompt(ids, len(ids))),
        (("decoder", "causal_lm"), "ba de", Prompt(ids)),
        (("decoder", ("causal_lm", "ul2")), "ba de", Prompt(ids)),
        (("decoder", ("causal_lm", "ul2")), "[S] ba de", Prompt([*mode, *ids, 0], len(ids) + 1)),
        (("encoder_decoder", "supervised"), "ba de", Prompt([*ids, eos])),
    ]
    for (architecture, objective), text, wanted in cases:
        lengths = {"inputs_length": 128, "targets_length": 128}
        found = generator_of(tokenizer, architecture, objective=objective, **lengths).prompt(text)
        assert found == wanted, (architecture, objective, text)
    chat = tokenizer.encode("user: ba de")
    for architecture, wanted in (("encoder_decoder", Prompt([*chat, eos])), ("decoder", Prompt([0, *chat, eos]))):
        generator = generator_of(tokenizer, architecture, objective="supervised", messages_field="m")
        assert generator.prompt("ba de") == wanted


def test_a_prompt_is_refused_if_the_encoder_reads_no_text(tokenizer):
    generator = generator_of(tokenizer, objective="causal_lm", inputs_length=1)
    assert generator.prompt("") == Prompt([tokenizer.eos_id])
    with pytest.raises(ConfigError, match="--prompt: this encoder-decoder was trained on causal_lm alone"):
        generator.prompt("ba")


def test_ids_after_eos_are_not_text(tokenizer):
    generator, ids = generator_of(tokenizer), tokenizer.encode("ba de")
    rows = np.array([[*ids, tokenizer.eos_id, 2, 7], [*ids, *[tokenizer.eos_id] * 3]])
    assert generator.texts(rows) == ["ba de", "ba de"]


def test_a_text_is_truncated_at_the_first_stop_text():
    assert truncate_at_stop("a b\nQ: c", ["Q:", "\n", ""]) == "a b"
    assert truncate_at_stop("a b", ["c"]) == truncate_at_stop("a b", []) == "a b"
