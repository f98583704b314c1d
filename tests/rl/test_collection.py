"""What a step learns from: failed rewards, groups without spread, cut and overlong answers, further rollouts."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from test_encode_once import shape_of

from t5like.checkpoint.metadata import first_history
from t5like.errors import DataError
from t5like.inference.prompt_format import Prompt
from t5like.metrics.throughput import Throughput
from t5like.metrics.time_spent import TimeSpent
from t5like.rl import collection, experience
from t5like.rl.collection import Collected
from t5like.rl.on_policy import OnPolicy
from t5like.rl.prompts import Example, PromptBatches
from t5like.rl.rollouts import Answers
from t5like.train.report import StepReporter
from t5like.train.rewind import BadSteps
from t5like.types import Largest, Sum

NAN = float("nan")
PROMPTS, ANSWERS = 16, 3


class Scores:
    """Scores the text NUMBER by a function of the prompt's number and this one."""

    names, weights = ["a", "b"], [1.0, 0.5]

    def __init__(self, function):
        self.function = function

    def __call__(self, rows, answers):
        values = [
            [self.function(row["number"], int(text)) for text in texts]
            for row, texts in zip(rows, answers, strict=True)
        ]
        return np.array([values, np.zeros_like(values)], np.float64)


def collected(monkeypatch, function, *, lengths=(3, 4, 12), **rl) -> tuple[Collected, list[int]]:
    """The answers of the first step, and the seeds of its rollouts. The texts are numbers, the ids have `lengths`."""
    config, seeds = shape_of(rl={"answers_per_prompt": ANSWERS, **rl}), []

    def sample(params, prompts, rows_B, *, answers, temperature, seed):
        seeds.append(seed)
        ids = [[[7] * (length - 1) + [1 if length < 12 else 7] for length in lengths] for _ in prompts]
        texts = [[str(10 * len(seeds) + number) for number in range(answers)] for _ in prompts]
        truncated_BG = np.array([[length == 12 for length in lengths]] * len(prompts))
        return Answers(ids, texts, np.zeros((len(prompts), answers, 12), np.float32), truncated_BG)

    monkeypatch.setattr(collection, "Sampler", lambda *_: sample)
    train = [Example(0, number, Prompt([3 + number])) for number in range(PROMPTS)]
    prompts = SimpleNamespace(train=train, row=lambda example: {"number": example.record})
    collector = collection.Collector(config, None, None, prompts, Scores(function))
    return collector.collect(None, PromptBatches(config, PROMPTS), np.arange(8)), seeds


def learned(step: Collected, values=None, kl_of_token=None, **rl) -> experience.Experience:
    """Mask and advantages of a step; `kl_of_token`: of the second answer to each prompt, the others have 0."""
    config = shape_of(rl={"answers_per_prompt": ANSWERS, **rl})
    rows = experience.answer_rows(config, [example.prompt for example in step.examples], step.answers.ids)
    values_BGL = None if values is None else np.full(rows.mask_BGL.shape, values, np.float32)
    kl_BGL = None if kl_of_token is None else rows.mask_BGL * np.array([0, kl_of_token, 0])[:, None]
    return OnPolicy._with_advantages(SimpleNamespace(_config=config), rows, step, kl_BGL, values_BGL)


def test_an_answer_whose_reward_failed_has_no_advantage_and_is_in_no_baseline(monkeypatch):
    fails = lambda prompt, text: NAN if text % 10 == 0 else float(text % 10)
    step, _ = collected(monkeypatch, fails)
    np.testing.assert_array_equal(step.total_BG, [[NAN, 1, 2]] * 8)
    np.testing.assert_array_equal(learned(step).advantages_BGL[..., 0], [[0, -0.5, 0.5]] * 8)
    values = collection.metrics(Scores(None), step)
    assert values["failed_rewards"].mean() == 8 and values["reward"] == (24.0, 16.0)
    zero, _ = collected(monkeypatch, fails, failed_reward="zero")
    np.testing.assert_array_equal(zero.total_BG, [[0, 1, 2]] * 8)
    np.testing.assert_array_equal(learned(zero).advantages_BGL[..., 0], [[-1, 0, 1]] * 8)


@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo", "rloo", "reinforce", "gae"])
@pytest.mark.parametrize("reward", [NAN, 3.0])
def test_a_step_without_any_reward_or_spread_has_no_gradient_and_finite_metrics(monkeypatch, advantage, reward):
    step, _ = collected(monkeypatch, lambda *_: reward)
    rows = learned(step, values=0.0 if advantage == "gae" else None, advantage=advantage)
    arrays = [x for x in rows if x is not None]
    assert all(np.isfinite(x).all() for x in arrays)
    if advantage == "gae" and np.isfinite(reward):  # values learn, and tokens before the end differ from it
        assert rows.mask_BGL.any()
    else:
        assert not rows.advantages_BGL.any()
        assert (advantage == "gae") != rows.mask_BGL.any()
    values = collection.metrics(Scores(None), step)
    assert all(np.isfinite(value.total) for value in values.values()) and values["frac_reward_zero_std"].mean() == 1


@pytest.mark.parametrize("failed", ["exclude", "zero"])
def test_rewards_that_have_no_value_are_refused_before_the_first_step_and_not_later(monkeypatch, failed):
    step, _ = collected(monkeypatch, lambda *_: NAN, failed_reward=failed)  # the other reward is 0
    if failed == "zero":
        step = step._replace(rewards_RBG=np.full_like(step.rewards_RBG, NAN))
    values = {"eval/reward": 0.0, "eval/standard_error": 0.0}
    scorer = SimpleNamespace(failures=lambda: ["reward a failed for 24 answers"])
    task = SimpleNamespace(_config=shape_of(), _answer_heldout=lambda *_: (values, [step]), _scorer=scorer)
    with pytest.raises(DataError, match="no held-out answer has a reward; reward a failed for 24 answers; t5like rl"):
        OnPolicy.evaluate(task, None, 0, lambda: None, early=False)
    assert OnPolicy.evaluate(task, None, 1, lambda: None, early=False)[0] == values


def test_masked_cut_answers_are_in_the_baseline_and_have_no_loss(monkeypatch):
    step, _ = collected(monkeypatch, lambda prompt, text: float(text % 10))
    kept, masked = learned(step), learned(step, truncated_answers="mask")
    np.testing.assert_array_equal(kept.mask_BGL.sum(-1), [[3, 4, 12]] * 8)
    np.testing.assert_array_equal(masked.mask_BGL.sum(-1), [[3, 4, 0]] * 8)
    np.testing.assert_array_equal(masked.advantages_BGL[:, :2], kept.advantages_BGL[:, :2])
    assert kept.advantages_BGL[0, 0, 0] == -1 and not masked.advantages_BGL[:, 2].any()
    assert collection.metrics(Scores(None), step)["completions/clipped_ratio"] == (8, 24)


def test_kl_as_reward_is_summed_over_an_answer_before_the_baseline_and_is_in_each_token_of_ppo(monkeypatch):
    step, _ = collected(monkeypatch, lambda prompt, text: float(text % 10))  # rewards 0, 1, 2
    kl = {"kl_of_token": 0.1, "reference": "first", "kl_as": "reward", "kl_coefficient": 0.5}
    rows = learned(step, advantage="rloo", **kl)  # the second answer has 4 tokens: 1 - 0.5 * 0.4
    np.testing.assert_allclose(rows.advantages_BGL[..., 0], [[-1.4, -0.2, 1.6]] * 8, rtol=1e-6)
    rows = learned(step, values=0.0, advantage="gae", gae_lambda=1.0, **kl)
    np.testing.assert_allclose(rows.returns_BGL[:, 1, :5], [[0.8, 0.85, 0.9, 0.95, 0]] * 8, rtol=1e-6)
    np.testing.assert_allclose(rows.returns_BGL[:, 2], np.full((8, 12), 2.0), rtol=1e-6)


def test_the_overlong_penalty_counts_tokens(monkeypatch):
    step, _ = collected(monkeypatch, lambda *_: 1.0, lengths=(8, 10, 12), overlong_tokens=4)
    np.testing.assert_allclose(step.total_BG, [[1, 0.5, 0]] * 8)


def test_redraws_replace_only_prompts_without_spread_by_prompts_with_it(monkeypatch):
    # In the first rollout odd prompts have spread, later all whose number is a multiple of 3.
    reward = lambda prompt, text: float(text % 10) if (prompt % 2 if text < 20 else prompt % 3 == 0) else 1.0
    first, seeds = collected(monkeypatch, reward)
    assert len(seeds) == 1
    step, seeds = collected(monkeypatch, reward, redraws=2)
    assert len(set(seeds)) == len(seeds) == 3
    again, _ = collected(monkeypatch, reward, redraws=2)
    assert again.examples == step.examples and again.answers.texts == step.answers.texts
    kept = replaced = 0
    for old, new, texts, totals in zip(first.examples, step.examples, step.answers.texts, step.total_BG, strict=True):
        if old.record % 2 or int(texts[0]) < 20:
            assert new == old and int(texts[0]) == 10
            kept += old.record % 2
        else:
            assert new.record % 3 == 0 and len(set(totals)) == ANSWERS
            replaced += 1
    assert kept and replaced
    full, seeds = collected(monkeypatch, lambda prompt, text: float(text % 10), redraws=2)
    assert len(seeds) == 1 and len({tuple(texts) for texts in full.answers.texts}) == 1


def test_prompts_of_a_step_depend_on_seed_row_and_redraw_alone():
    config = shape_of(rl={"updates_per_rollout": 2})
    batches = PromptBatches(config, PROMPTS)
    rows = [batches.at(step) for step in range(8)]
    assert all((rows[step] == rows[step + 1]).all() for step in (0, 2, 4, 6))
    np.testing.assert_array_equal(np.concatenate(rows[::2]), np.arange(32))
    epochs = batches.indices(np.arange(32)).reshape(2, PROMPTS)
    assert (np.sort(epochs) == np.arange(PROMPTS)).all() and (epochs[0] != epochs[1]).any()
    assert (batches.indices(np.arange(32), redraw=1) != epochs.ravel()).any()


def test_a_rewind_in_the_middle_of_a_rollout_passes_over_all_of_its_prompts():
    config = shape_of(rl={"updates_per_rollout": 4})
    batches, bad = PromptBatches(config, PROMPTS), BadSteps(config, first_history(config))
    seen = [batches.at(step).tolist() for step in (0, 4)]
    bad.last, bad.history = (6, "the loss is not finite"), bad.history._replace(bad_steps=1)
    checkpoints = SimpleNamespace(wait=lambda: None, steps=lambda: [4], delete_after=lambda step: None)
    assert bad.rewind(checkpoints) == 4
    batches.follow(bad.history.rows)
    assert batches.at(0).tolist() == seen[0]
    assert batches.at(4).tolist() == batches.at(7).tolist() == list(range(16, 24))  # those of rollouts 0, 1: below 16
    assert batches.at(8).tolist() == list(range(24, 32))


def test_metrics_are_over_all_steps_since_the_last_line():
    config = shape_of(rl={"method": "policy"})
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, log_every=2, num_steps=8))
    lines, ignored = [], SimpleNamespace(update=lambda *_: None, note=lambda _: None)
    writer = SimpleNamespace(write=lambda step, values: lines.append((step, values)), undone_seconds=0.0)
    bad = BadSteps(config, first_history(config))
    report = StepReporter(config, writer, ignored, Throughput(0.0, None), TimeSpent(), bad, lambda *_: None)
    one = Sum(np.float32(1), np.float32(1))
    for done, (total, weight) in enumerate([(3, 1), (1, 3), (5, 1), (5, 1)], start=1):
        same = {"loss": one, "grad_norm": one, "skipped_updates": Sum(np.float32(0), np.float32(1)), "tokens": one}
        largest = Largest(np.float32(total))
        report(done, same | {"reward": Sum(np.float32(total), np.float32(weight)), "ratio/max": largest})
    values = [(step, values["train/reward"], values["train/ratio/max"]) for step, values in lines]
    assert values == [(2, 1.0, 3.0), (4, 5.0, 5.0)]
