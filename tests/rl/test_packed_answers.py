"""Packed prompts and answers: the same losses, gradients and metrics as in rows of their own, in fewer positions."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from conftest import small
from model_variants import drawn_params
from test_encode_once import tokens

from t5like.config.rl_schema import RLConfig
from t5like.config.schema import Config
from t5like.inference.prompt_format import Prompt
from t5like.rl import advantages, experience, objective, packing
from t5like.rl.experience import Experience
from t5like.rl.scoring import scores

PROMPTS, ANSWERS = 8, 2
CLIP = {"updates_per_rollout": 2, "entropy_coefficient": 0.01}
KL = {"reference": "first", "kl_coefficient": 0.04}
SEQUENCES = {"ratio": "sequence", "aggregation": "sequence_mean"}
ALGORITHMS = {
    "GRPO": {"advantage": "grpo", "aggregation": "sequence_mean", "kl_estimator": "k3", **KL, **CLIP},
    "Dr. GRPO": {"advantage": "dr_grpo", "aggregation": "constant", **CLIP},
    "DAPO": {"advantage": "grpo", "aggregation": "token_mean", **CLIP},
    "RLOO": {"advantage": "rloo", "ratio": "sequence", "kl_as": "reward", **KL, **CLIP},
    "GSPO": {"advantage": "grpo", **SEQUENCES, **CLIP},
    "PPO": {"advantage": "gae", **CLIP},
    **{method: {"method": method} for method in ("dpo", "simpo", "reward_model")},
}
NAMES = {
    "encoder_decoder": list(ALGORITHMS),
    "decoder": list(ALGORITHMS)[:7],
    "encoder": ["reward_model"],
}


def shape_of(architecture: str) -> Config:
    """One layer with a scalar head, and rows that are much longer than most answers."""
    model = {"num_layers": 1, "num_kv_heads": 2, "architecture": architecture}
    if architecture == "decoder":
        model |= {"positions": "rotary"}
    rl = {"method": "reward_model"} if architecture == "encoder" else {"method": "policy", "rewards": ["length"]}
    rl |= {"advantage": "gae", "answers_per_prompt": ANSWERS, "entropy_coefficient": 0.01} if len(rl) > 1 else {}
    return small(model=model, data={"objective": "supervised", "inputs_length": 24, "targets_length": 16}, rl=rl)


def rows_of(config: Config) -> Experience:
    """Short prompts and answers, and one answer of 16 tokens."""
    rng, start = np.random.default_rng(2), [0] if config.model.architecture == "decoder" else []
    lengths = [5, *rng.integers(1, 7, PROMPTS - 1)]
    prompts = [Prompt([*rng.integers(3, 400, n).tolist(), *start], int(n) if start else 0) for n in lengths]
    answers = [[tokens(rng, 6) for _ in range(ANSWERS)] for _ in prompts]
    answers[3][1] = rng.integers(3, 400, 16).tolist()
    return experience.answer_rows(config, prompts, answers)


def learned(rl: RLConfig, rows: Experience) -> Experience:
    """The rows with what the loss of `rl` needs."""
    rng, shape = np.random.default_rng(3), rows.mask_BGL.shape
    normal = lambda mean, size: rng.normal(mean, size, shape).astype(np.float32)
    rows = rows._replace(reference_log_p_BGL=normal(-6, 0.3) if rl.needs_reference else None)
    if rl.method != "policy":
        return rows
    of_policy = {"sampler_log_p_BGL": normal(-6, 0.3), "old_log_p_BGL": normal(-6, 0.3)}
    if rl.advantage == "gae":
        values_BGL = normal(0, 1)
        made = advantages.gae(normal(0, 1), values_BGL, rows.mask_BGL, 1.0, 0.95)
        of_policy |= {"advantages_BGL": made[0], "returns_BGL": made[1], "old_values_BGL": values_BGL}
    else:
        advantages_BG = advantages.advantages(rl.advantage, rng.normal(size=shape[:2]))
        of_policy |= {"advantages_BGL": advantages_BG[..., None] * rows.mask_BGL}
    mask_BGL = rows.mask_BGL.copy()
    mask_BGL[1, 0] = 0  # a cut answer that is not learned from
    return rows._replace(mask_BGL=mask_BGL, **of_policy)


def metrics_and_gradients(config: Config, rls: list[RLConfig], params, experiences: list[Experience]):
    """Of each loss its metrics and the gradient of its mean with respect to the scores; that of all with respect to the
    parameters. The scores are computed once for all losses.
    """
    scored, gradient_of = jax.vjp(partial(scores, config, experience=experiences[0]), params)
    metrics, slopes = [], []
    for rl, each in zip(rls, experiences, strict=True):

        def mean(scored, rl=rl, each=each):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(objective, "scores", lambda *_: scored)
                changed = dataclasses.replace(config, rl=rl)
                loss = objective.loss_fn_of(changed)(changed, None, each, None)
            return loss.objective / loss.metrics["loss"].weight, loss.metrics

        slope, of_loss = jax.grad(mean, has_aux=True)(scored)
        slopes.append(slope)
        metrics.append(of_loss)
    return metrics, slopes, gradient_of(jax.tree.map(lambda *parts: sum(parts), *slopes))[0]


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder", "encoder"])
def test_losses_gradients_and_metrics_are_those_of_rows_of_one_answer(architecture):
    config = shape_of(architecture)
    names = NAMES[architecture]
    rls = [RLConfig(**{"method": "policy", "answers_per_prompt": ANSWERS, **ALGORITHMS[name]}) for name in names]
    rows = rows_of(config)
    plan = packing.pack(rows, 1)
    assert plan.decoder_rows * plan.groups <= PROMPTS * ANSWERS / 2 and plan.segment_BG.max() > 2
    whole = [learned(rl, rows) for rl in rls]
    packed = [plan.rows(each) for each in whole]
    params = drawn_params(config, rows.rows())
    program = jax.jit(partial(metrics_and_gradients, config, rls))
    (metrics, slopes, grads), of_packed = program(params, whole), program(params, packed)
    for name, desired, actual in zip(names, metrics, of_packed[0], strict=True):
        assert desired.keys() == actual.keys() and desired["loss"].weight > 0
        for metric, value in desired.items():
            np.testing.assert_allclose(actual[metric], value, rtol=1e-5, atol=1e-5, err_msg=f"{name} {metric}")
    for name, desired, actual in zip(names, slopes, of_packed[1], strict=True):
        assert any(np.abs(x).max() > 1e-3 for x in desired), name
        for x_BGL, y_PRL in zip(desired, actual, strict=True):
            np.testing.assert_allclose(y_PRL, plan.packed(np.asarray(x_BGL)), rtol=1e-5, atol=1e-6, err_msg=name)
    for desired, actual in zip(jax.tree.leaves(grads), jax.tree.leaves(of_packed[2]), strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-5)
    assert max(np.abs(x).max() for x in jax.tree.leaves(grads)) > 1e-2


def drawn(rng: np.random.Generator, shortest: int, longest: int) -> tuple[list[Prompt], Experience]:
    """16 prompts with 4 answers each of random lengths; prompts are up to 8 tokens longer."""
    ids = lambda most: rng.integers(3, 400, rng.integers(shortest, most + 1)).tolist()
    prompts = [Prompt(ids(longest + 8)) for _ in range(16)]
    return prompts, experience.answer_rows(
        shape_of("encoder_decoder"), prompts, [[ids(longest) for _ in range(4)] for _ in prompts]
    )


def check_places(plan: packing.Packing, prompts: list[Prompt], rows: Experience) -> None:
    """Each answer has a place of its own, where it reads its prompt; positions of both begin at 0."""
    made = plan.rows(rows)
    np.testing.assert_array_equal(plan.unpacked(made.targets_BGL), rows.targets_BGL)
    assert made.mask_BGL.sum() == rows.mask_BGL.sum() and made.segments_BGL.max() <= 16
    for b, g in np.ndindex(plan.row_BG.shape):
        group, row = plan.group_B[b], plan.row_BG[b, g]
        place = made.segments_BGL[group, row] == plan.segment_BG[b, g]
        assert (made.sources_BGL[group, row][place] == plan.segment_B[b]).all()
        assert made.positions_BGL[group, row][place].tolist() == list(range(plan.lengths_BG[b, g]))
        assert made.decoder_BGL[group, row][place][0] == 0
        source = made.encoder_segments_BS[group] == plan.segment_B[b]
        assert made.encoder_BS[group][source].tolist() == prompts[b].ids
        assert made.encoder_positions_BS[group][source].tolist() == list(range(len(prompts[b].ids)))


@pytest.mark.parametrize("shortest, longest, parts", [(1, 4, 4), (1, 16, 1), (9, 16, 2)])
def test_every_answer_has_a_place_of_its_own_and_rows_are_few(shortest, longest, parts):
    rng, shapes = np.random.default_rng(0), set()
    for _ in range(8):
        prompts, rows = drawn(rng, shortest, longest)  # rows have 24 and 16 positions
        plan = packing.pack(rows, parts)
        check_places(plan, prompts, rows)
        assert plan.groups % parts == 0
        used = plan.groups * (24 + plan.decoder_rows * 16) / (rows.encoder_BS.size + rows.decoder_BGL.size)
        assert used < 0.5 if longest == 4 else used == 1 if shortest == 9 else used <= 1
        shapes.add((plan.groups, plan.decoder_rows))
    assert len(shapes) <= 4


def test_sizes_grow_by_at_most_a_quarter_and_are_multiples():
    assert list(packing.sizes(23, 1)) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 23]
    assert list(packing.sizes(64, 8)) == [8, 16, 24, 32, 40, 48, 56, 64]
