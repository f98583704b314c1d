"""Training from pairs of answers, with each kind of loss."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ENCODER_DECODER

from t5like.checkpoint.run_directory import load
from t5like.config.schema import Config
from t5like.errors import DataError
from t5like.inference.prompt_format import Prompt
from t5like.metrics.writers import read
from t5like.rl.model_reward import RewardModel
from t5like.rl.prompts import Example, Prompts
from t5like.rl.run import evaluate

# An encoder reads prompt and answer in one row. It starts from random weights.
ENCODER = {"model.architecture": "encoder", "init_from.checkpoint": "", "data.inputs_length": 48}
LOGPS = {"logps/chosen", "logps/rejected"}
METRICS = {  # besides those of all methods, with TRL's names
    "dpo": LOGPS,
    "orpo": LOGPS | {"nll_loss"},
    "reward_model of an encoder-decoder": set(),
    "reward_model of an encoder": set(),
}
OF_ALL = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}


@pytest.mark.parametrize("method", METRICS)
def test_pairs_are_learned_and_held_out_metrics_do_not_depend_on_the_batch_size(
    method, rl_flags, trained, command, tmp_path
):
    values = {"rl.method": method.split()[0], "rl.rewards": "", "optimizer.learning_rate": 0.003}
    values |= {"rl.eval_prompts": 16, "train.eval_every": 4}  # all of them
    values["data.packing"] = method == "dpo"  # packed rows have several programs
    if method.endswith("of an encoder"):
        values |= ENCODER | {"tokenizer.path": trained / "tokenizer.model"}
    elif method.endswith("of an encoder-decoder"):
        values |= ENCODER_DECODER | {"init_from.checkpoint": trained}
    settings = [f"--config.{name}={value}" for name, value in values.items()]
    code, out, err = command("rl", *rl_flags, *settings, f"--workdir={tmp_path}/run")
    assert code == 0, err
    rows = read(tmp_path / "run")
    assert all(math.isfinite(value) for row in rows for value in row.values())
    trained, heldout = ([row for row in rows if f"{kind}/loss" in row] for kind in ("train", "eval"))
    assert {f"train/{name}" for name in OF_ALL | METRICS[method]} <= trained[0].keys()
    assert {f"eval/{name}" for name in OF_ALL | METRICS[method]} <= heldout[0].keys()
    assert trained[-1]["train/loss"] < trained[0]["train/loss"]
    assert heldout[-1]["eval/rewards/margins"] > heldout[0]["eval/rewards/margins"]  # falls if signs are exchanged
    if method == "dpo":  # the policy is the reference
        assert heldout[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)

    loaded = load(tmp_path / "run")
    data = dataclasses.replace(loaded.config.data, batch_size=3)  # 10 held-out pairs: neither 3 nor 8 divides them
    found, _ = evaluate(loaded._replace(config=dataclasses.replace(loaded.config, data=data)), tmp_path / "run")
    assert found == pytest.approx({name: heldout[-1][name] for name in found}, rel=1e-4, abs=1e-5)

    if method.startswith("reward_model"):
        scorer = RewardModel(tmp_path / "run")
        rows = [{"inputs": "sort b a"}, {"inputs": "sort " + "c d e " * 40}]  # the second one is longer than a row
        scores_BG = scorer(rows, [["a b", "b a", "a " * 40], ["a b", "b a", ""]])
        assert np.isfinite(scores_BG[0]).tolist() == [True, True, False] and np.isnan(scores_BG[1]).all()
        alone_BG = scorer(rows[:1], [["b a"]])
        assert scores_BG[0, 1] == pytest.approx(alone_BG[0, 0], abs=1e-5) != scores_BG[0, 0]
    if method.endswith("encoder-decoder"):
        code, out, err = command("export", "--format=hf", f"--workdir={tmp_path}/run", f"--output={tmp_path}/exported")
        assert code == 0 and "equal step 4 bit for bit" in out, err  # the scalar head is no part of the family


def test_pairs_without_a_preference_are_counted_and_a_source_of_nothing_else_is_refused():
    prompts = SimpleNamespace(_config=Config(), notes=[])
    equal, other = (Example(0, 0, Prompt([3]), ([7, 1], second)) for second in ([7, 1], [8, 1]))
    Prompts._check_pairs(prompts, "jsonl:a", [other, Example(0, 1, Prompt([3]))])
    assert not prompts.notes
    Prompts._check_pairs(prompts, "jsonl:a", [equal, other, other])
    assert prompts.notes == ["data.source=jsonl:a: chosen and rejected are equal in 1 of 3 pairs"]
    with pytest.raises(DataError, match="jsonl:a: chosen and rejected are equal in all 2 pairs; use pairs that differ"):
        Prompts._check_pairs(prompts, "jsonl:a", [equal, equal])
