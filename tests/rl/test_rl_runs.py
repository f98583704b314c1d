"""Whole runs of `t5like rl`: metrics, resuming, limits, and the other commands on their run directories."""

import json
import math
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ENCODER_DECODER, contents, main

from t5like.checkpoint.checkpoints import Checkpoints
from t5like.checkpoint.run_directory import load
from t5like.checkpoint.step_directories import COMMITTED
from t5like.config.rl_schema import RLConfig
from t5like.config.schema import Config, TrainConfig
from t5like.errors import Diverged
from t5like.metrics.time_spent import PREFIX
from t5like.metrics.writers import read
from t5like.rl.on_policy import OnPolicy
from t5like.rl.scorer import Scorer

# PPO with all that needs the reference, the values and several updates of one rollout.
PPO = {
    "rl.advantage": "gae",
    "rl.reference": "first",
    "rl.kl_coefficient": 0.1,
    "rl.kl_as": "reward",
    "rl.kl_estimator": "k1",
    "rl.updates_per_rollout": 2,
    "train.early_evals": 2,
    "train.eval_every": 4,
    "train.checkpoint_every": 4,
    "train.keep_checkpoints": 3,
}
OF_TRL = {  # names that TRL's trainers report, without their prefix
    "reward",
    "reward_std",
    "rewards/length/mean",
    "rewards/length/std",
    "frac_reward_zero_std",
    "kl",
    "entropy",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/clipped_ratio",
    "completions/mean_terminated_length",
}
OWN = {"value_loss", "sampler_gap", "ratio/mean", "ratio/max", "failed_rewards"}
OWN |= {"rollout_tokens_per_second", "update_tokens_per_second", "rollout_seconds", "reward_seconds", "update_seconds"}
HELD_OUT = {"reward", "standard_error", "rewards/length/mean", "completions/mean_length", "completions/clipped_ratio"}
TIMES = ("seconds", "per_second")  # ends of names


def settings(values: dict) -> list[str]:
    return [f"--config.{name}={value}" for name, value in values.items()]


@pytest.fixture(scope="module")
def ppo_flags(rl_flags, trained_decoder, tmp_path_factory) -> list[str]:
    """Flags of a run of PPO from weights that a test may remove."""
    shutil.copytree(trained_decoder, weights := tmp_path_factory.mktemp("weights") / "run")
    return [*rl_flags, *settings({"rl.rewards": "length", "init_from.checkpoint": weights, **PPO})]


@pytest.fixture(scope="module")
def ppo(ppo_flags, tmp_path_factory):
    """A complete run. Read it, copy it, but leave it as it is."""
    workdir = tmp_path_factory.mktemp("ppo") / "run"
    assert main(["rl", *ppo_flags, f"--workdir={workdir}"]) == 0
    return workdir


def values(workdir) -> list[dict[str, float]]:
    """All metrics that are not times."""
    is_time = lambda name: name.endswith(TIMES) or name.startswith(PREFIX)
    rows = [{name: x for name, x in row.items() if not is_time(name)} for row in read(workdir)]
    return [row for row in rows if row.keys() > {"step"}]


def test_a_run_reports_finite_metrics_by_the_names_of_trl_and_writes_its_answers(ppo):
    rows = [row for row in read(ppo) if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {f"train/{name}" for name in OF_TRL} <= rows[0].keys()
    assert {f"train/{name}" for name in OF_TRL | OWN} <= set().union(*rows)
    assert {f"eval/{name}" for name in HELD_OUT} <= read(ppo)[0].keys()
    assert (ppo / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert all(math.isfinite(value) for row in read(ppo) for value in row.values())
    assert rows[0]["train/ratio/mean"] == pytest.approx(1, abs=1e-5) and rows[0]["train/kl"] == pytest.approx(
        0, abs=1e-5
    )
    assert rows[1]["train/ratio/mean"] != 1 and rows[2]["train/kl"] != 0  # the second update, the second rollout
    assert rows[0]["train/reward"] == rows[1]["train/reward"] != rows[2]["train/reward"]
    assert max(row["train/sampler_gap"] for row in rows) < 1e-4
    assert [row["step"] for row in read(ppo) if "eval/reward" in row] == [0, 2, 4]  # not 1: between two updates
    assert sorted(path.name for path in (ppo / "answers").iterdir()) == ["0.jsonl", "2.jsonl"]
    answers = [json.loads(line) for line in (ppo / "answers/2.jsonl").read_text().splitlines()]
    assert len(answers) == 8 * 3 and all(answer["reward"] == len(answer["answer"]) for answer in answers)
    assert np.mean([answer["reward"] for answer in answers]) == pytest.approx(rows[2]["train/reward"], rel=1e-6)


def test_a_run_stopped_by_a_signal_continues_exactly_without_config_and_first_weights(
    ppo, ppo_flags, command, monkeypatch, tmp_path
):
    workdir, calls, score = tmp_path / "run", [], Scorer.__call__

    def signalled(self, rows, answers):
        calls.append(len(answers[0]))
        if calls.count(3) == 1:  # the first rollout; other calls are of evaluations
            os.kill(os.getpid(), signal.SIGTERM)
        return score(self, rows, answers)

    monkeypatch.setattr(Scorer, "__call__", signalled)
    code, _, err = command("rl", *ppo_flags, f"--workdir={workdir}")
    assert code == 75 and "stopped by a signal after step 2" in err, err
    monkeypatch.undo()
    weights = next(flag for flag in ppo_flags[::-1] if "init_from.checkpoint" in flag).partition("=")[2]
    shutil.move(weights, tmp_path / "away")
    (workdir / "reference").rename(tmp_path / "reference")
    code, _, err = command("rl", f"--workdir={workdir}")
    assert code == 4 and err.splitlines()[-1] == (
        f"t5like: {workdir}/reference is missing; put it back, it has the run's first weights"
    )
    shutil.copytree(tmp_path / "reference", workdir / "reference")
    for path in (workdir / "reference/0/state").glob("**/d/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    code, _, err = command("rl", f"--workdir={workdir}")
    assert code == 4 and err.splitlines()[-1].startswith(f"t5like: {workdir}/reference/0"), err
    assert err.endswith("; put a copy of it back, it has the run's first weights\n")
    shutil.rmtree(workdir / "reference")
    shutil.move(tmp_path / "reference", workdir / "reference")
    code, _, err = command("rl", f"--workdir={workdir}")
    shutil.move(tmp_path / "away", weights)
    assert code == 0, err
    assert values(workdir) == values(ppo) and contents(workdir / "answers") == contents(ppo / "answers")
    leaves = [Checkpoints(path / "checkpoints", keep=3).meta(4).leaves for path in (workdir, ppo)]
    assert leaves[0] == leaves[1] and len(leaves[0]) > 20  # with their digests

    shutil.copytree(workdir, before := tmp_path / "before")
    code, out, err = command("replay", f"--workdir={workdir}", "--step=4")  # from checkpoint 2: a rollout, two updates
    assert code == 0, err
    losses = [row["train/loss"] for row in read(ppo) if "train/loss" in row]
    assert [float(loss) for loss in re.findall(r"step \d: loss (\S+),", out)] == pytest.approx(losses[2:], rel=1e-5)
    assert out.splitlines()[-1] == "first      none: loss, gradient and update are finite"
    assert contents(workdir) == contents(before)


def test_the_other_commands_work_on_a_run_directory(ppo, command, tmp_path):
    shutil.copytree(ppo, workdir := tmp_path / "run")
    code, out, err = command("rl", f"--workdir={workdir}")
    assert code == 0 and "complete   4 of 4 steps are done" in out, err
    code, out, _ = command("evaluate", f"--workdir={workdir}")
    assert code == 0 and json.loads(out)["eval/rewards/length/mean"] == json.loads(out)["eval/reward"], out
    code, out, _ = command("generate", f"--workdir={workdir}", "--prompt=sort b a", "--max_new_tokens=4")
    assert code == 0
    code, out, _ = command("inspect", "run", f"--workdir={workdir}")
    assert code == 0 and "saved      steps" in out
    code, out, _ = command("compare", workdir, ppo, f"--output={tmp_path}/both.png")
    assert code == 0 and (tmp_path / "both.png").stat().st_size > 1000
    code, _, err = command("train", f"--workdir={workdir}")
    assert code == 2 and len(err.splitlines()) == 1 and "is for t5like rl" in err


def test_max_kl_ends_a_run_with_its_newest_checkpoint_and_failed_rewards_are_counted(
    rl_flags, trained, command, monkeypatch, tmp_path
):
    code = "def score(row, answer):\n    return len(answer) if sum(row['targets'].encode()) % 2 else int('x')\n"
    (tmp_path / "of_odd_rows.py").write_text(code)
    preset = Path("configs/tiny.py").absolute()
    monkeypatch.chdir(tmp_path)
    values = {
        "rl.rewards": "of_odd_rows:score",
        "rl.reference": "first",
        "rl.max_kl": 1e-6,
        "train.checkpoint_every": 1,
    }
    values |= ENCODER_DECODER | {"init_from.checkpoint": trained}
    arguments = ["rl", *rl_flags, f"--config={preset}", *settings(values), f"--workdir={tmp_path}/run"]
    code, _, err = command(*arguments)
    assert re.search(r"held-out reward .*; without [12] of 3 answers, whose reward failed", err), err
    message = (
        r"t5like: after step 1 the KL .* is \S+ per token, more than rl.max_kl=1e-06; no checkpoint is below it; .*"
    )
    assert code == 5 and re.fullmatch(message, err.splitlines()[-1]), err
    assert Checkpoints(tmp_path / "run/checkpoints", keep=1).steps() == [1]
    assert load(tmp_path / "run").step == 1


@pytest.mark.parametrize(("index", "text"), [(9, "no checkpoint is below it"), (22, "step 10"), (33, "step 30")])
def test_max_kl_names_the_newest_checkpoint_from_before(index, text, tmp_path):
    for step in (10, 22):  # that of step 22 has the weights whose KL is too large; that of step 30 is being written
        (tmp_path / f"checkpoints/{step}").mkdir(parents=True)
        (tmp_path / f"checkpoints/{step}/{COMMITTED}").touch()
    config = Config(rl=RLConfig(max_kl=0.5), train=TrainConfig(checkpoint_every=30))
    task = SimpleNamespace(_config=config, _workdir=tmp_path)
    kl, mask = np.full((1, 2, 3), -3.0), np.ones((1, 2, 3))
    with pytest.raises(Diverged, match=f"after step {index} .* more than rl.max_kl=0.5; .*{text}; look"):
        OnPolicy._check_kl(task, kl, mask, index)
    OnPolicy._check_kl(task, kl / 30, mask, index)
