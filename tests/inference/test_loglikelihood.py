"""Log-likelihoods of texts compared with one row per token; truncation, windows and stop texts."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from conftest import random_batch, small

from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.data.tokenizers.vocabulary import DECODER_START_ID
from t5like.errors import ConfigError
from t5like.inference.loglikelihood import LoglikelihoodScorer, MaskedRow, ScoringExample, bucket, masked_rows
from t5like.inference.prompt_format import Prompt
from t5like.inference.target_scores import SCORING_ROWS, score_targets
from t5like.optim import train_state
from t5like.sharding import auto
from t5like.sharding import mesh as meshes
from t5like.types import Batch

SHAPES = ("encoder_decoder", "decoder", "encoder")


@pytest.fixture(scope="module")
def tokenizer(trained):
    return Tokenizer.load(trained / "tokenizer.model", num_sentinels=20)


@pytest.fixture(scope="module")
def models(tokenizer):
    """The scorer of a random model of each shape; rows have 32 tokens at most, so that one program each does."""
    scorers = {}

    def model(shape: str) -> LoglikelihoodScorer:
        if shape not in scorers:
            config = small(
                model={"architecture": shape, "num_layers": 1, "model_dim": 16, "num_heads": 2, "mlp_dim": 32},
                data={"inputs_length": 20} if shape == "decoder" else {},
                tokenizer={"vocab_size": 400, "num_sentinels": 20},
            )
            mesh = meshes.make_mesh(config, jax.devices()[:1])
            config = auto.resolve_auto(config, mesh)
            init = lambda key: nn.meta.unbox(train_state.init_params(config, random_batch(config), key))
            rng = np.random.default_rng(1)
            random = lambda x: rng.normal(scale=0.5, size=x.shape).astype(np.float32)
            params = jax.tree.map(random, jax.eval_shape(init, jax.random.key(0)))
            scorers[shape] = LoglikelihoodScorer(config, mesh, params, tokenizer)
        scorer = scorers[shape]
        scorer.num_contexts = scorer.num_truncated = scorer.truncated_tokens = 0
        return scorer

    return model


def each_target(model, rows):
    """log p of a target in each row, and whether it is the most likely: (row, index, target, encoder inputs)."""
    row_BL, is_token_BL, inputs_BL, is_input_BL, targets_BL = (np.zeros((SCORING_ROWS, 32), np.int32) for _ in range(5))
    for number, (row, index, target, inputs) in enumerate(rows):
        row_BL[number, : len(row)], is_token_BL[number, : len(row)] = row, 1
        inputs_BL[number, : len(inputs)], is_input_BL[number, : len(inputs)] = inputs, 1
        targets_BL[number, index] = target
    weights_BL = (targets_BL > 0).astype(np.float32)
    batch = {
        "encoder": Batch(None, targets_BL, weights_BL, row_BL, is_token_BL),
        "decoder": Batch(
            row_BL,
            targets_BL,
            weights_BL,
            decoder_segments_BL=is_token_BL,
            prefix_BL=np.zeros((SCORING_ROWS, 32), bool),
        ),
        "encoder_decoder": Batch(row_BL, targets_BL, weights_BL, inputs_BL, is_input_BL, np.ones_like(is_token_BL)),
    }[model.config.model.architecture]
    with jax.set_mesh(model.mesh):
        found = jax.device_get(score_targets(model.config, model.params, batch))
    return -found.nats_B[: len(rows)], found.greedy_B[: len(rows)]


PAIRS = [("ba de fi", " go hu ka."), ("", "mal pis"), ("tre sla qui ven dor ", "no")]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_score_of_a_continuation_is_the_sum_over_its_tokens(shape, models, tokenizer):
    model, (eos, mask, cls) = models(shape), (tokenizer.eos_id, *tokenizer.sentinel_ids[:2].tolist())
    for (context, continuation), got in zip(PAIRS, model.score_pairs(PAIRS), strict=True):
        text, spaces = context.rstrip(), context[len(context.rstrip()) :]
        before = tokenizer.encode(text) if text else []
        after = tokenizer.encode(context + continuation)[len(before) :]
        if shape == "decoder":
            row, first = [*(before or [eos]), *after], len(before or [eos])
            rows = [(row[: first + i], first + i - 1, token, []) for i, token in enumerate(after)]
        elif shape == "encoder_decoder":  # trained on span corruption: the context is an input that ends with EOS
            after = tokenizer.encode(spaces + continuation)
            rows = [([DECODER_START_ID, *after[:i]], i, token, [*before, eos]) for i, token in enumerate(after)]
        else:
            row, first = [cls, *before, *after, eos], 1 + len(before)
            rows = [
                ([*row[:index], mask, *row[index + 1 :]], index, row[index], [])
                for index in range(first, first + len(after))
            ]
        log_p, greedy = each_target(model, rows)
        assert got == (pytest.approx(log_p.sum(), rel=1e-4), greedy.all())


@pytest.mark.parametrize("shape", ["encoder_decoder", "decoder"])
def test_only_the_most_likely_token_is_greedy(shape, models):
    model = models(shape)
    prompt = model.example_of("ba de", "").prompt
    found = model.score([ScoringExample(prompt, [token]) for token in range(380)])
    assert [one.greedy for one in found].count(True) == 1
    assert max(found).greedy


@pytest.mark.parametrize("shape", SHAPES)
def test_spaces_between_context_and_continuation_belong_to_the_continuation(shape, models, tokenizer):
    model = models(shape)
    assert model.example_of("ba de ", "fi go") == model.example_of("ba de", " fi go")
    example = model.example_of("ba de", " fi go")
    assert example.continuation[-len(tokenizer.encode(" go")) :] == tokenizer.encode(" go")
    if shape != "encoder_decoder":  # the model continues the text
        assert [*example.prompt.ids, *example.continuation] == tokenizer.encode("ba de fi go")


def test_an_encoder_decoder_of_causal_lm_alone_has_the_context_in_its_decoder(tokenizer):
    config = small(data={"objective": "causal_lm"}, tokenizer={"vocab_size": 400, "num_sentinels": 20})
    model = LoglikelihoodScorer(config, None, None, tokenizer)
    example = model.example_of("ba de", " fi")
    before = tokenizer.encode("ba de")
    assert example == ScoringExample(Prompt([tokenizer.eos_id]), tokenizer.encode("ba de fi"), len(before))
    batch = model._batch([example], 32, 32)
    assert batch.weights_BL[0].nonzero()[0].tolist() == list(range(len(before), len(example.continuation)))
    with pytest.raises(ConfigError, match="causal_lm alone"):
        model.generate(["ba"])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_long_context_is_truncated_from_the_left_and_counted(shape, models, tokenizer):
    model, long, short = models(shape), "ba de fi go hu " * 20 + "ka le", " mi no"
    [found] = model.score_pairs([(long, short)])
    answer = tokenizer.encode(short)
    ids = tokenizer.encode(long + short)
    own = {"decoder": len(answer) - 1, "encoder": len(answer) + 2, "encoder_decoder": 1}[shape]  # EOS; CLS, SEP
    room = model.length - own
    end = [tokenizer.eos_id] if shape == "encoder_decoder" else []
    kept = ids[len(ids) - len(answer) - room : len(ids) - len(answer)]
    assert found == model.score([ScoringExample(Prompt([*kept, *end]), answer)])[0]
    assert (model.num_contexts, model.num_truncated) == (1, 1) and model.truncated_tokens == len(ids) - len(
        answer
    ) - room


def test_a_truncated_prompt_keeps_its_first_special_token_and_its_prefix(models, tokenizer):
    model, mode = models("decoder"), int(tokenizer.sentinel_ids[-1])
    assert model.truncate(Prompt([mode, 5, 6, 7, 8, 1, DECODER_START_ID], 6), 4) == Prompt(
        [mode, 8, 1, DECODER_START_ID], 3
    )
    assert model.truncate(Prompt([5, 6, 7]), 3) == Prompt([5, 6, 7]) and (
        model.num_contexts,
        model.num_truncated,
        model.truncated_tokens,
    ) == (
        2,
        1,
        3,
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_windows_predict_every_token_once_with_as_much_context_as_fits(shape, models, tokenizer):
    model, text = models(shape), "ba de fi go hu ka le mi no pu " * 12
    ids, windows = tokenizer.encode(text), model.windows(text)
    assert [token for example in windows for token in example.continuation] == ids and len(windows) > 2
    if shape == "decoder":
        assert windows[0].prompt.ids == [tokenizer.eos_id]
        lengths = [len(example.prompt.ids) + len(example.continuation) - 1 for example in windows]
        assert set(lengths) == {model.length}  # also of the last one
        assert windows[-1].prompt.ids == ids[-model.length - 1 : -len(windows[-1].continuation)]
    assert model.score_texts([text, "ba"]) == pytest.approx(
        [sum(one.log_p for one in model.score(windows)), model.score_pairs([("", "ba")])[0].log_p]
    )
    assert model.num_truncated == 0


def test_generated_text_ends_before_the_first_stop_text(models):
    model, contexts = models("decoder"), ["ba de fi", "go"]
    texts = model.generate(contexts, max_new_tokens=8)
    prompts = [model.example_of(context, "").prompt for context in contexts]
    ids_BL = model.generator.ids(prompts + prompts[:1] * (SCORING_ROWS - 2), max_new_tokens=8, width=32)[:2]
    assert texts == model.generator.texts(ids_BL) and all(texts)
    examples = [
        ScoringExample(prompt, [token for token in ids if token])
        for prompt, ids in zip(prompts, ids_BL.tolist(), strict=True)
    ]
    assert all(one.greedy for one in model.score(examples))
    stop = texts[0][len(texts[0]) // 2 :][:2]
    assert model.generate(contexts, max_new_tokens=8, stop=[stop, "\n\n"])[0] == texts[0][: texts[0].index(stop)]


def test_an_encoder_generates_nothing(models):
    with pytest.raises(ConfigError, match=r"^model\.architecture=encoder can't generate text; use [^\n]*$"):
        models("encoder").generate(["ba"])


def test_each_token_of_a_continuation_is_masked_in_a_row_of_its_own():
    assert masked_rows(ScoringExample(Prompt([5, 6]), [7, 8]), 90, 91, 1) == [
        MaskedRow([91, 5, 6, 90, 8, 1], 3, 7),
        MaskedRow([91, 5, 6, 7, 90, 1], 4, 8),
    ]


def test_lengths_are_rounded_up_so_that_few_programs_are_compiled():
    assert [bucket(length) for length in (0, 1, 32, 33, 64, 65, 1000)] == [32, 32, 32, 64, 64, 128, 1024]
