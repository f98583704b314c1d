"""Likelihoods of texts against each token's own row, and what is cut, windowed and stopped."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from conftest import random_batch, small

from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.data.tokenizers.vocabulary import DECODER_START_ID
from t5like.errors import ConfigError
from t5like.inference.generate import Prompt
from t5like.inference.loglikelihood import (
    SCORING_ROWS,
    Case,
    Likelihoods,
    MaskedRow,
    bucket,
    masked_rows,
    score_targets,
)
from t5like.optim import step
from t5like.sharding import auto
from t5like.sharding import mesh as meshes
from t5like.types import Batch

SHAPES = ("encoder_decoder", "decoder", "encoder")


@pytest.fixture(scope="module")
def tokenizer(trained):
    return Tokenizer.load(trained / "tokenizer.model", num_sentinels=20)


@pytest.fixture(scope="module")
def models(tokenizer):
    """Likelihoods of a random model of each shape; rows have 32 tokens at most, so that one program each does."""
    made = {}

    def model(shape: str) -> Likelihoods:
        if shape not in made:
            config = small(
                model={"architecture": shape, "num_layers": 1, "model_dim": 16, "num_heads": 2, "mlp_dim": 32},
                data={"inputs_length": 20} if shape == "decoder" else {},
                tokenizer={"vocab_size": 400, "num_sentinels": 20},
            )
            mesh = meshes.make_mesh(config, jax.devices()[:1])
            config = auto.resolve_auto(config, mesh)
            init = lambda key: nn.meta.unbox(step.init_params(config, random_batch(config), key))
            rng = np.random.default_rng(1)
            random = lambda x: rng.normal(scale=0.5, size=x.shape).astype(np.float32)
            params = jax.tree.map(random, jax.eval_shape(init, jax.random.key(0)))
            made[shape] = Likelihoods(config, mesh, params, tokenizer)
        likelihoods = made[shape]
        likelihoods.requests = likelihoods.cut = likelihoods.cut_tokens = 0
        return likelihoods

    return model


def each_target(model, rows):
    """log p of a target in each row, and whether it is the likeliest: (row, place, target, what the encoder reads)."""
    row_BL, real_BL, read_BL, read_real_BL, targets_BL = (np.zeros((SCORING_ROWS, 32), np.int32) for _ in range(5))
    for number, (row, place, target, read) in enumerate(rows):
        row_BL[number, : len(row)], real_BL[number, : len(row)] = row, 1
        read_BL[number, : len(read)], read_real_BL[number, : len(read)] = read, 1
        targets_BL[number, place] = target
    weights_BL = (targets_BL > 0).astype(np.float32)
    batch = {
        "encoder": Batch(None, targets_BL, weights_BL, row_BL, real_BL),
        "decoder": Batch(
            row_BL, targets_BL, weights_BL, decoder_segments_BL=real_BL, prefix_BL=np.zeros((SCORING_ROWS, 32), bool)
        ),
        "encoder_decoder": Batch(row_BL, targets_BL, weights_BL, read_BL, read_real_BL, np.ones_like(real_BL)),
    }[model.config.model.architecture]
    with jax.set_mesh(model.mesh):
        found = jax.device_get(score_targets(model.config, model.params, batch))
    return -found.nats_B[: len(rows)], found.greedy_B[: len(rows)]


PAIRS = [("ba de fi", " go hu ka."), ("", "mal pis"), ("tre sla qui ven dor ", "no")]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_continuation_is_as_likely_as_its_tokens_one_by_one(shape, models, tokenizer):
    model, (eos, mask, cls) = models(shape), (tokenizer.eos_id, *tokenizer.sentinel_ids[:2].tolist())
    for (context, continuation), got in zip(PAIRS, model.pairs(PAIRS), strict=True):
        text, spaces = context.rstrip(), context[len(context.rstrip()) :]
        before = tokenizer.encode(text) if text else []
        after = tokenizer.encode(context + continuation)[len(before) :]
        if shape == "decoder":
            row, first = [*(before or [eos]), *after], len(before or [eos])
            rows = [(row[: first + i], first + i - 1, token, []) for i, token in enumerate(after)]
        elif shape == "encoder_decoder":  # gaps are what it has learned: the context is an input, ended by EOS
            after = tokenizer.encode(spaces + continuation)
            rows = [([DECODER_START_ID, *after[:i]], i, token, [*before, eos]) for i, token in enumerate(after)]
        else:
            row, first = [cls, *before, *after, eos], 1 + len(before)
            rows = [
                ([*row[:place], mask, *row[place + 1 :]], place, row[place], [])
                for place in range(first, first + len(after))
            ]
        log_p, greedy = each_target(model, rows)
        assert got == (pytest.approx(log_p.sum(), rel=1e-4), greedy.all())


@pytest.mark.parametrize("shape", ["encoder_decoder", "decoder"])
def test_only_the_likeliest_token_is_greedy(shape, models):
    model = models(shape)
    prompt = model.case("ba de", "").prompt
    found = model.score([Case(prompt, [token]) for token in range(380)])
    assert [one.greedy for one in found].count(True) == 1
    assert max(found).greedy


@pytest.mark.parametrize("shape", SHAPES)
def test_spaces_between_context_and_continuation_belong_to_the_continuation(shape, models, tokenizer):
    model = models(shape)
    assert model.case("ba de ", "fi go") == model.case("ba de", " fi go")
    case = model.case("ba de", " fi go")
    assert case.answer[-len(tokenizer.encode(" go")) :] == tokenizer.encode(" go")
    if shape != "encoder_decoder":  # the text goes on
        assert [*case.prompt.ids, *case.answer] == tokenizer.encode("ba de fi go")


def test_an_encoder_decoder_of_causal_lm_alone_reads_the_context_in_its_decoder(tokenizer):
    config = small(data={"objective": "causal_lm"}, tokenizer={"vocab_size": 400, "num_sentinels": 20})
    model = Likelihoods(config, None, None, tokenizer)
    case = model.case("ba de", " fi")
    before = tokenizer.encode("ba de")
    assert case == Case(Prompt([tokenizer.eos_id]), tokenizer.encode("ba de fi"), len(before))
    batch = model._batch([case], 32, 32)
    assert batch.weights_BL[0].nonzero()[0].tolist() == list(range(len(before), len(case.answer)))
    with pytest.raises(ConfigError, match="causal_lm alone"):
        model.continuations(["ba"])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_long_context_is_cut_from_the_left_and_counted(shape, models, tokenizer):
    model, long, short = models(shape), "ba de fi go hu " * 20 + "ka le", " mi no"
    [found] = model.pairs([(long, short)])
    answer = tokenizer.encode(short)
    ids = tokenizer.encode(long + short)
    own = {"decoder": len(answer) - 1, "encoder": len(answer) + 2, "encoder_decoder": 1}[shape]  # EOS; CLS, SEP
    room = model.length - own
    end = [tokenizer.eos_id] if shape == "encoder_decoder" else []
    kept = ids[len(ids) - len(answer) - room : len(ids) - len(answer)]
    assert found == model.score([Case(Prompt([*kept, *end]), answer)])[0]
    assert (model.requests, model.cut) == (1, 1) and model.cut_tokens == len(ids) - len(answer) - room


def test_a_cut_prompt_keeps_its_mark_and_its_prefix(models, tokenizer):
    model, mode = models("decoder"), int(tokenizer.sentinel_ids[-1])
    assert model.fit(Prompt([mode, 5, 6, 7, 8, 1, DECODER_START_ID], 6), 4) == Prompt([mode, 8, 1, DECODER_START_ID], 3)
    assert model.fit(Prompt([5, 6, 7]), 3) == Prompt([5, 6, 7]) and (model.requests, model.cut, model.cut_tokens) == (
        2,
        1,
        3,
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_windows_predict_every_token_once_behind_all_that_has_room(shape, models, tokenizer):
    model, text = models(shape), "ba de fi go hu ka le mi no pu " * 12
    ids, windows = tokenizer.encode(text), model.windows(text)
    assert [token for case in windows for token in case.answer] == ids and len(windows) > 2
    if shape == "decoder":
        assert windows[0].prompt.ids == [tokenizer.eos_id]
        lengths = [len(case.prompt.ids) + len(case.answer) - 1 for case in windows]
        assert set(lengths) == {model.length}  # that of the last one too
        assert windows[-1].prompt.ids == ids[-model.length - 1 : -len(windows[-1].answer)]
    assert model.texts([text, "ba"]) == pytest.approx(
        [sum(one.log_p for one in model.score(windows)), model.pairs([("", "ba")])[0].log_p]
    )
    assert model.cut == 0


def test_what_is_said_ends_before_the_first_stop_text(models):
    model, contexts = models("decoder"), ["ba de fi", "go"]
    said = model.continuations(contexts, most=8)
    prompts = [model.case(context, "").prompt for context in contexts]
    ids_BL = model.generator.ids(prompts + prompts[:1] * (SCORING_ROWS - 2), max_new_tokens=8, width=32)[:2]
    assert said == model.generator.texts(ids_BL) and all(said)
    answers = [
        Case(prompt, [token for token in ids if token]) for prompt, ids in zip(prompts, ids_BL.tolist(), strict=True)
    ]
    assert all(one.greedy for one in model.score(answers))
    stop = said[0][len(said[0]) // 2 :][:2]
    assert model.continuations(contexts, most=8, stop=[stop, "\n\n"])[0] == said[0][: said[0].index(stop)]


def test_an_encoder_generates_nothing(models):
    with pytest.raises(ConfigError, match=r"^model\.architecture=encoder can't generate text; use [^\n]*$"):
        models("encoder").continuations(["ba"])


def test_each_token_of_an_answer_is_masked_in_a_row_of_its_own():
    assert masked_rows(Case(Prompt([5, 6]), [7, 8]), 90, 91, 1) == [
        MaskedRow([91, 5, 6, 90, 8, 1], 3, 7),
        MaskedRow([91, 5, 6, 7, 90, 1], 4, 8),
    ]


def test_few_lengths_are_compiled():
    assert [bucket(length) for length in (0, 1, 32, 33, 64, 65, 1000)] == [32, 32, 32, 64, 64, 128, 1024]
