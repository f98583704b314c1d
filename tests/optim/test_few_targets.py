"""The head reads only positions that have a target: as many as the objective can have, and the loss does not change."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import denoised_batch, small
from model_variants import drawn_params, loss_and_gradients

from t5like.data.objectives import head_length as lengths
from t5like.data.objectives.denoisers import denoisers
from t5like.metrics import flops

PAIRS = {"architecture": "encoder", "token_types": 2, "next_sentence_head": True, "head": "mlm"}
CASES = {  # model, objective, the part of a row that has targets
    "mlm": ({"architecture": "encoder"}, ("mlm",), 0.15),
    "pairs": (PAIRS, ("mlm", "mlm_nsp"), 0.15),
    "decoder": ({"architecture": "decoder"}, ("span_corruption",), 0.14),
    "ul2": ({"architecture": "decoder"}, ("ul2",), 0.45),
}


def config_of(case: str, **train):
    model, objective, _ = CASES[case]
    return small(model=model, data={"objective": objective, "inputs_length": 66, "targets_length": 48}, train=train)


@pytest.mark.parametrize("case", CASES)
def test_no_row_has_more_targets_than_the_head_reads(case):
    config = config_of(case)
    most = lengths.head_length(config)
    counts, length = [], 0
    for denoiser in denoisers(config):
        weights_BL = denoised_batch(config, denoiser).weights_BL
        counts.append((weights_BL > 0).sum(1).max())
        length = weights_BL.shape[1]
    assert max(counts) == most < length
    assert most / length == pytest.approx(CASES[case][2], abs=0.05)


def test_the_densest_phase_counts():
    config = config_of("mlm")
    data = dataclasses.replace(config.data, phase_noise_density=(0.3, 0.05))
    denser = dataclasses.replace(config, data=data)
    assert lengths.head_length(denser) == round(0.3 * 64) > lengths.head_length(config) == round(0.15 * 64)


@pytest.mark.parametrize("objective", ["causal_lm", "prefix_lm"])
def test_rows_of_many_targets_are_read_whole(objective):
    config = small(model={"architecture": "decoder"}, data={"objective": (objective,)})
    assert lengths.head_length(config) == config.row_length


@pytest.mark.parametrize("case, chunk", [("mlm", 0), ("pairs", 4), ("decoder", 0)])
def test_loss_and_gradients_are_those_of_all_positions(case, chunk, monkeypatch):
    config = config_of(case, loss_chunk=chunk)
    batch = denoised_batch(config, denoisers(config)[-1])
    params = drawn_params(config, batch)
    few, shorter = loss_and_gradients(config, params, batch), flops.model_flops(config)
    monkeypatch.setattr(lengths, "FEW_TARGETS", 0)
    whole = loss_and_gradients(config, params, batch)
    assert flops.model_flops(config) > shorter
    for ours, others in zip(jax.tree.leaves(few), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, others, rtol=2e-5, atol=1e-5 * np.abs(others).max())
