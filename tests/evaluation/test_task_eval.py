"""Task evaluation: log-likelihoods compared with the full forward pass; scores and files of whole runs."""

import json
import re

import jax
import numpy as np
import pytest
from conftest import small
from model_variants import params_of

from t5like.inference.prompt_format import Prompt
from t5like.inference.target_scores import score_targets, scoring_batch
from t5like.model.transformer import Transformer
from t5like.sharding import auto
from t5like.sharding import mesh as meshes
from t5like.types import Batch


def model_of(architecture):
    config = small(model={"architecture": architecture, "num_layers": 1})
    mesh = meshes.make_mesh(config, jax.devices()[:1])
    config = auto.resolve_auto(config, mesh)
    return config, params_of(config, seed=1)


@pytest.mark.parametrize("architecture, eos_ids", [("encoder_decoder", (1, 44, 45)), ("decoder", (1,))])
def test_the_nats_of_a_target_and_any_eos_id_are_those_of_the_unpadded_row(architecture, eos_ids):
    config, params = model_of(architecture)
    inputs, answers = [[5, 6, 7, 8, 1], [9, 10, 1]], [[20, 21, 1], [30, 1]]
    if architecture == "decoder":
        prompts = [Prompt([*ids, 0], len(ids)) for ids in inputs]
    else:
        prompts = [Prompt(ids) for ids in inputs]
    pairs = [(prompt, answer) for prompt in prompts for answer in answers]
    found = score_targets(config, params, scoring_batch(config, pairs, 9, 4), eos_ids)
    logits_of = jax.jit(lambda batch: Transformer(config).apply({"params": params}, batch))
    for (prompt, answer), nats, greedy in zip(pairs, *found, strict=True):
        ids, ones = np.array(prompt.ids)[None], np.ones((1, len(answer)), np.float32)
        if architecture == "decoder":
            row = np.array([[*prompt.ids, *answer[:-1]]])
            prefix = np.arange(row.shape[1])[None] < prompt.prefix
            batch = Batch(row, row, np.ones(row.shape, np.float32), prefix_BL=prefix)
        else:
            batch = Batch(np.array([[0, *answer[:-1]]]), np.array([answer]), ones, ids)
        logits = np.float64(logits_of(batch)[0, -len(answer) :])
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        wanted = -np.log(p[np.arange(len(answer) - 1), answer[:-1]]).sum() - np.log(p[-1, list(eos_ids)].sum())
        most_likely = [1 if token in eos_ids else token for token in logits.argmax(-1).tolist()]
        assert nats == pytest.approx(float(wanted), rel=1e-5) and greedy == (most_likely == answer)


# ---- Through the command line ----


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Supervised examples that a tiny model can learn: a word and a number -> one of two labels."""
    path = tmp_path_factory.mktemp("tasks") / "words.jsonl"
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for number in range(400):
            label = ["yes", "no"][int(rng.random() < 0.3)]
            word = {"yes": ["alpha", "beta"], "no": ["gamma", "delta"]}[label][number % 2]
            file.write(json.dumps({"word": f"{word} {number}", "label": label}) + "\n")
    return path


@pytest.fixture
def supervised(command, flags, tasks, tmp_path):
    """Run `t5like train` on them; returns the run directory, the metrics and the output."""

    def run(name: str, **values):
        values = {
            "data.source": f"jsonl:{tasks}", "data.objective": "supervised", "data.inputs_template": "{word}",
            "data.targets_template": "{label}", "data.heldout_fraction": 0.2, "tokenizer.vocab_size": 320,
            "evaluate.metrics": "accuracy,f1", "evaluate.max_new_tokens": 8, **values,
        }  # fmt: skip
        settings = [f"--config.{field}={value}" for field, value in values.items()]
        code, out, err = command("train", *flags, f"--workdir={tmp_path}/{name}", *settings)
        assert code == 0, err
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return tmp_path / name, [json.loads(line) for line in lines], out + err

    return run


@pytest.mark.parametrize("architecture, choices", [("encoder_decoder", ""), ("decoder", "yes,no")])
def test_a_task_is_learned_and_scored_above_the_majority(architecture, choices, supervised, command):
    settings = {"evaluate.answer_choices": choices} if choices else {}
    workdir, records, output = supervised(
        "run", **{"train.num_steps": 60, "model.architecture": architecture, **settings}
    )
    majority = records[0]["baseline/majority/accuracy"]
    scores = [record["eval/score/accuracy"] for record in records if "eval/score/f1" in record]
    assert 55 < majority < 85 and scores[-1] > majority + 10 and scores[0] <= majority
    lines = [json.loads(line) for line in (workdir / "predictions" / "60.jsonl").read_text().splitlines()]
    right = np.mean([line["prediction"] == line["target"] for line in lines])
    assert scores[-1] == pytest.approx(100 * right) and (("nats" in lines[0]) == bool(choices))
    if choices:
        assert all(min(line["nats"], key=line["nats"].get) == line["prediction"] for line in lines)
    code, out, err = command("evaluate", f"--workdir={workdir}")
    assert code == 0, err
    last = next(record for record in reversed(records) if "eval/score/f1" in record)  # behind it: times by part
    assert json.loads(out)["eval/score/f1"] == pytest.approx(last["eval/score/f1"])
    rule = json.loads(out)["eval/rule/f1"]
    assert (
        "SQuAD" in rule
        and f"metric     f1: {rule}" in output
        and re.search(rf"eval/score/f1 .*\({re.escape(rule)}\)", err)
    )
    code, out, err = command("generate", f"--workdir={workdir}", "--prompt=beta 1000", "--max_new_tokens=4")
    assert code == 0 and out.strip() == "yes", err


def test_a_run_starts_with_the_weights_of_another_except_those_that_are_reinitialized(supervised):
    unscored = {"evaluate.metrics": "", "model.architecture": "decoder"}  # which compiles fastest
    first, records, _ = supervised("first", **unscored, **{"train.num_steps": 20, "optimizer.ema_decay": 0.5})
    untrained, learned = (record["eval/loss"] for record in records if "eval/loss" in record)
    begin = {**unscored, "init_from.checkpoint": first, "train.num_steps": 1}
    _, again, output = supervised("second", **begin)
    assert again[1]["eval/loss"] == pytest.approx(learned, rel=1e-6)
    assert f"from step 20 of {first}" in output
    workdir, renewed, _ = supervised("third", **begin, **{"init_from.reinitialize": "head,decoder/layers/.*"})
    assert renewed[1]["eval/loss"] > learned + 0.5 and abs(renewed[1]["eval/loss"] - untrained) < 1
    report = (workdir / "init_from.txt").read_text()
    assert re.search(r"(?m)^decoder/final_norm/scale +copied$", report)
    assert re.search(r"(?m)^head +new, random$", report)


@pytest.mark.parametrize(
    "values, code, message",
    [
        ({"init_from.checkpoint": "/nowhere", "tokenizer.path": ""}, 4, "init_from.checkpoint=/nowhere"),
        ({"model.mlp_dim": 48}, 4, "does not fit: params/decoder/layers/mlp/gate/kernel is float32[1, 32, 64], not"),
        ({"model.num_layers": 2}, 4, "does not fit: "),
        ({"init_from.reinitialize": "hed"}, 2, "init_from.reinitialize='hed' matches no parameter"),
        ({"init_from.step": 0}, 4, "holds no complete checkpoint of step 0; there are 1, 2"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_and_nothing_is_left(
    values, code, message, command, flags, trained, tmp_path
):
    values = {"init_from.checkpoint": trained, **values}
    settings = [f"--config.{field}={value}" for field, value in values.items()]
    found, _, err = command("train", *flags, f"--workdir={tmp_path}/run", *settings)
    assert found == code and message in err and not (tmp_path / "run").exists()
