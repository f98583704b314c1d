"""A prompt is encoded once for all of its answers: the same values and gradients, at the cost of one."""

import dataclasses
import functools
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small
from model_variants import drawn_params

from t5like.config.schema import Config
from t5like.inference import decoding
from t5like.inference.prompt_format import Prompt
from t5like.inference.sampling import TracedOptions
from t5like.model import attention
from t5like.model.kernels import tpu_attention
from t5like.model.transformer import Transformer
from t5like.rl.experience import answer_rows
from t5like.types import Batch

PROMPTS, ANSWERS = 3, 4


def shape_of(rl: dict | None = None, **model) -> Config:
    """A small encoder-decoder with grouped-query heads."""
    rl = {"method": "policy", "rewards": ["length"], **(rl or {})}
    return small(model={"num_kv_heads": 2, **model}, data={"objective": "supervised"}, rl=rl)


def tokens(rng: np.random.Generator, most: int) -> list[int]:
    """1 to `most` ids of text."""
    return rng.integers(3, 400, rng.integers(1, most + 1)).tolist()


def rows_of(config: Config, prompts: int, answers: int) -> Batch:
    """Prompts and answers of different lengths."""
    rng, data = np.random.default_rng(0), config.data
    of_prompts = [[tokens(rng, data.targets_length) for _ in range(answers)] for _ in range(prompts)]
    return answer_rows(config, [Prompt(tokens(rng, data.inputs_length)) for _ in range(prompts)], of_prompts).rows()


def repeated(batch: Batch) -> Batch:
    """The same with a copy of the prompt for each answer."""
    copies = lambda x: np.repeat(x, len(batch.decoder_BL) // len(x), axis=0)
    return batch._replace(encoder_BS=copies(batch.encoder_BS), encoder_segments_BS=copies(batch.encoder_segments_BS))


def hidden_and_gradients(config: Config, params, batches: list[Batch]):
    """Of each batch: the decoder's output, and the gradient of a sum over the targets."""

    def total(params, batch):
        hidden_BLD = Transformer(config).apply({"params": params}, batch, method="hidden").x_BLD
        weights_BLD = jnp.sin(jnp.arange(hidden_BLD.size, dtype=jnp.float32)).reshape(hidden_BLD.shape)
        return (hidden_BLD * weights_BLD * batch.weights_BL[..., None]).sum(), hidden_BLD

    return jax.jit(lambda params, batches: [jax.grad(total, has_aux=True)(params, batch) for batch in batches])(
        params, batches
    )


@pytest.mark.parametrize("layers, kernels", [("unroll", "plain"), ("scan", "cpu"), ("unroll", "tpu")])
def test_one_encoder_row_for_several_answers_equals_a_copy_for_each(monkeypatch, layers, kernels):
    calls = []

    def attend(*args, **options):
        calls.append(args[0].shape[:3])
        return tpu_attention.attend(*args, **options, interpret=True)

    monkeypatch.setattr(attention, "tpu_attention", SimpleNamespace(**{**vars(tpu_attention), "attend": attend}))
    config = shape_of(layers=layers, kernels=kernels, num_layers=1)
    batch = rows_of(config, PROMPTS, ANSWERS)
    params = drawn_params(config, batch)
    once, copied = hidden_and_gradients(config, params, [batch, repeated(batch)])
    real_BL = batch.weights_BL > 0
    np.testing.assert_allclose(once[1][real_BL], copied[1][real_BL], rtol=1e-5, atol=1e-5)
    for actual, desired in zip(jax.tree.leaves(once[0]), jax.tree.leaves(copied[0]), strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=2e-5)
    joined = (PROMPTS, config.model.num_heads, ANSWERS * config.data.targets_length)  # queries of cross-attention
    assert (joined in calls) == (kernels == "tpu"), calls


def test_the_encoders_work_does_not_grow_with_the_number_of_answers():
    config = shape_of(num_layers=1)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, inputs_length=512, targets_length=4))
    flops = lambda function, *arguments: jax.jit(function).lower(*arguments).cost_analysis()["flops"]
    batches = {answers: rows_of(config, 2, answers) for answers in (1, 5)}
    init = lambda key: nn.meta.unbox(Transformer(config).init(key, batches[1])["params"])
    abstract = jax.eval_shape(init, jax.random.key(0))
    encode = lambda params: Transformer(config).apply(
        {"params": params}, batches[1].encoder_BS, batches[1].encoder_segments_BS, method="encode"
    )

    def gradient(batch, params):
        total = lambda params: Transformer(config).apply({"params": params}, batch, method="hidden").x_BLD.sum()
        return jax.grad(total)(params)

    def sampled(answers, params):
        return decoding.decode_texts(
            config,
            params,
            batches[1].encoder_BS,
            np.array([512, 512], np.int32),
            decoding.row_keys(np.uint32(0), np.arange(2, dtype=np.uint32)),
            np.array([1], np.int32),
            TracedOptions(temperature=np.float32(1)),
            max_new_tokens=4,
            num_texts=answers,
        )

    encoder = flops(encode, abstract)
    one, five = (flops(functools.partial(gradient, batch), abstract) for batch in batches.values())
    assert one > 2 * encoder and five - one < 0.2 * encoder, (encoder, one, five)
    one, five = (flops(functools.partial(sampled, answers), abstract) for answers in (1, 5))
    assert one > encoder and five - one < 0.2 * encoder, (encoder, one, five)
