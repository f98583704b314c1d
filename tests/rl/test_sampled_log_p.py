"""The sampler's log-probabilities are the trainer's, on the same weights."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import small
from model_variants import drawn_params

from t5like.inference import decoding
from t5like.inference.prompt_format import Prompt
from t5like.rl.experience import answer_rows, in_rows
from t5like.rl.rollouts import Sampler
from t5like.rl.scoring import scores
from t5like.sharding import mesh as meshes

EOS = 1
MODELS = {
    "encoder_decoder": {},
    "decoder": {"architecture": "decoder", "positions": "rotary", "num_kv_heads": 2, "scale_attention": True},
}


class Ids:
    """What the sampler needs of a tokenizer."""

    eos_id = EOS

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("architecture", MODELS)
def test_the_log_probabilities_of_the_sampler_are_those_of_the_trainer(rng, architecture, temperature):
    config = small(
        data={"objective": "supervised", "batch_size": 4, "inputs_length": 16, "targets_length": 12},
        model={"num_layers": 1, **MODELS[architecture]},
        rl={"method": "policy", "rewards": ["length"], "temperature": temperature},
    )
    few = dataclasses.replace(config.tokenizer, vocab_size=24, num_sentinels=2)  # some answers end early, others don't
    config = dataclasses.replace(config, tokenizer=few)
    start = [0] if architecture == "decoder" else []  # the decoder's start token is a part of its prompt
    prompts = []
    for length in (3, 16, 9, 1):
        ids = rng.integers(3, 20, length).tolist()
        prompts.append(Prompt([*ids, *start], length if start else 0))
    rows = answer_rows(config, prompts, [[[EOS]]] * 4)
    params = drawn_params(config, rows.rows())
    params = jax.tree.map(lambda x: 2 * x, params)  # far from uniform
    sampler = Sampler(config, meshes.make_mesh(config, jax.devices()[:1]), Ids())
    answers = sampler(params, prompts, np.arange(4), answers=6, temperature=temperature, seed=0)
    programs = decoding.decode_texts._cache_size()  # one for each bucket of lengths
    shorter = [Prompt(prompt.ids[-2:], min(prompt.prefix, 1)) for prompt in prompts]
    sampler(params, shorter, np.arange(4, 8), answers=6, temperature=temperature, seed=1)
    assert decoding.decode_texts._cache_size() == programs
    assert 0 < answers.truncated_BG.sum() < 24  # with EOS and without
    for of_prompt, cuts in zip(answers.ids, answers.truncated_BG, strict=True):
        for ids, is_cut in zip(of_prompt, cuts, strict=True):
            assert (EOS in ids) != is_cut and (len(ids) == 12 if is_cut else ids.index(EOS) == len(ids) - 1)

    experience = answer_rows(config, prompts, answers.ids)
    mask_BGL = experience.mask_BGL > 0
    assert (mask_BGL.sum(-1) == answers.lengths_BG).all()
    # The mask has each token of the answer as a target, its EOS included, and nothing else.
    rows = zip(experience.rows().targets_BL, mask_BGL.reshape(24, -1), strict=True)
    targets = [row[mask].tolist() for row, mask in rows]
    assert targets == [ids for of_prompt in answers.ids for ids in of_prompt]
    scored_BGL = jax.jit(lambda params, rows: scores(config, params, rows).log_p_BGL)(params, experience)
    sampled_BGL = in_rows(experience, answers.log_p_BGL)
    assert not sampled_BGL[~mask_BGL].any() and sampled_BGL[mask_BGL].std() > 0.3
    np.testing.assert_allclose(sampled_BGL[mask_BGL], scored_BGL[mask_BGL], rtol=1e-4, atol=1e-4)
