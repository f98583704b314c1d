"""Commands end to end, by flags only: train on own text, resume, evaluate, generate; in this process."""

import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import DECODER, contents, run_at
from shared_directories import made_once

from t5like.checkpoint.checkpoints import Checkpoints

CAUSAL = {**DECODER, "data.objective": "causal_lm"}  # `decoder_flags`, for `train`


@pytest.fixture
def train(command, flags, tmp_path):
    """Run `t5like train` with more flags in tmp_path/NAME, which must succeed; returns the run directory and stdout."""

    def run(name: str, *more: str, **values) -> tuple[Path, str]:
        settings = [f"--config.{field.replace('__', '.')}={value}" for field, value in values.items()]
        code, out, err = command("train", *flags, f"--workdir={tmp_path}/{name}", *settings, *more)
        assert code == 0, err
        return tmp_path / name, out

    return run


@pytest.fixture(scope="module")
def straight(decoder_flags, tmp_path_factory) -> Path:
    """An uninterrupted run of 12 steps, with which others are compared."""
    return made_once(tmp_path_factory, "straight", lambda place: run_at(place, decoder_flags)) / "run"


@pytest.fixture(scope="module")
def half(decoder_flags, tmp_path_factory) -> Path:
    """A complete run of the first 6 steps of `straight`; copy it before use."""
    flags = [*decoder_flags, "--config.train.num_steps=6"]
    return made_once(tmp_path_factory, "half", lambda place: run_at(place, flags)) / "run"


def records(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def series(workdir: Path, name: str) -> list[float]:
    return [record[name] for record in records(workdir) if name in record]


def leaves(workdir: Path, step: int) -> dict:
    """Shape, dtype and digest of every leaf of the saved state: equal only if the states are bitwise equal."""
    return Checkpoints(workdir / "checkpoints", keep=1).meta(step).leaves


# ---- Own text ----


def test_training_on_own_text_lowers_the_loss(train, command, tmp_path, texts):
    with gzip.open(tmp_path / "own.jsonl.gz", "wt") as file:
        for line in (texts / "a.txt").read_text().splitlines():
            file.write(json.dumps({"body": line}) + "\n")
    workdir, out = train(
        "run",
        data__source=f"jsonl:{tmp_path}/*.jsonl.gz",
        data__text_field="body",
        train__num_steps=60,
        train__eval_every=30,
        evaluate__samples=True,
        model__attention_init="random",  # slower: the loss still falls in the second half
    )
    losses = series(workdir, "eval/loss")
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0] and losses[2] < series(workdir, "baseline/unigram")[0]
    assert abs(losses[0] - np.log(400)) < 0.5
    assert np.mean(series(workdir, "train/loss")[-5:]) < np.mean(series(workdir, "train/loss")[:5]) - 1
    assert {path.name for path in workdir.iterdir()} == {
        ".lock",
        "config.json",
        "tokenizer.model",
        "checkpoints",
        "metrics.jsonl",
        "provenance.jsonl",
        "tensorboard",
        "loss.png",
        "samples",
        "samples.txt",
    }
    of_steps = {path.name: path.read_text() for path in (workdir / "samples").iterdir()}
    assert sorted(of_steps) == ["0.txt", "30.txt", "60.txt"] and of_steps["0.txt"] != of_steps["30.txt"]
    assert of_steps["60.txt"] == (workdir / "samples.txt").read_text()
    assert (
        out.count("---- held-out passage") == 3
        and "held-out loss" in out
        and (workdir / "samples.txt").read_text() in out
    )

    code, out, err = command("evaluate", f"--workdir={workdir}")
    values = json.loads(out)
    assert code == 0 and "held out, step 60" in err and f"{values['eval/loss']:.4f}" in err  # a table for people
    assert values == json.loads((workdir / "evaluations" / "60.json").read_text())
    assert values["step"] == 60 and values["eval/loss"] == pytest.approx(losses[2], rel=1e-5)
    assert values["baseline/unigram"] == pytest.approx(series(workdir, "baseline/unigram")[0])

    code, out, err = command("generate", f"--workdir={workdir}", "--prompt=ba <extra_id_0> de", "--max_new_tokens=8")
    assert code == 0 and err == "" and out.startswith("ba ") and out.endswith(" de\n") and "<extra_id_" not in out


def test_generate_is_deterministic(command, trained):
    def say(*options) -> str:
        code, out, err = command("generate", f"--workdir={trained}", "--prompt=ba de", "--max_new_tokens=8", *options)
        assert code == 0 and err == ""
        return out

    greedy = say()
    assert greedy == say("--seed=5", "--step=2")
    sampled = say("--temperature=1", "--seed=1")
    assert say("--temperature=1", "--seed=1") == sampled != say("--temperature=1", "--seed=2")


# ---- Other shapes and choices, through flags ----

CASES = {
    "causal mixture": {
        "model__architecture": "decoder",
        "data__objective": "causal_lm",
        "model__positions": "rotary",
        "data__rates": "3,1",
        "data__cross_document_attention": False,
    },
    "prefix": {"model__architecture": "decoder", "data__objective": "prefix_lm", "optimizer__ema_decay": 0.9},
}


@pytest.mark.parametrize("case", CASES)
def test_a_variant_trains_and_evaluate_returns_the_loss_of_the_run(case, train, command, texts):
    values = dict(CASES[case])
    if "mixture" in case:
        values["data__source"] = f"text:{texts}/a.txt,text:{texts}/b.txt"
    workdir, _ = train("run", train__num_steps=30, train__eval_batches=100, **values)
    first, last = series(workdir, "eval/loss")
    assert last < first - 0.3
    code, out, err = command("evaluate", f"--workdir={workdir}")
    assert code == 0 and json.loads(out)["eval/loss"] == pytest.approx(last, rel=1e-5), err
    code, out, err = command("generate", f"--workdir={workdir}", "--prompt=ba de", "--max_new_tokens=4")
    assert code == 0 and err == ""


def test_an_encoder_trains_and_fills_masks(train, command):
    workdir, out = train(
        "run",
        model__architecture="encoder",
        model__token_types=2,
        data__objective="mlm,mlm_nsp",
        train__num_steps=40,
        train__log_every=20,
    )
    first, last = series(workdir, "eval/loss")
    assert last < first - 0.3 and series(workdir, "eval/nsp_loss")[0] > 0 and "  masked  truth " in out
    share = series(workdir, "train/share/objective/mlm_nsp")
    assert len(share) == 2 and share[0] == pytest.approx(0.5, abs=0.1)
    code, out, err = command("evaluate", f"--workdir={workdir}")
    assert code == 0 and json.loads(out)["eval/loss/objective/mlm"] > 0, err
    code, out, err = command("generate", f"--workdir={workdir}", "--prompt=ba <extra_id_0> de")
    assert code == 0 and out.startswith("ba ") and out.endswith(" de\n") and "<extra_id_" not in out, err


def test_a_run_changes_from_one_objective_to_another(train, command, texts):
    workdir, out = train(
        "run",
        data__cross_document_attention=False,
        data__objective="span_corruption,prefix_lm",
        data__objective_rates="1,0,0,1",
        data__phase_boundaries=6,
        data__source=f"text:{texts}/a.txt,text:{texts}/b.txt",
        train__num_steps=12,
        train__log_every=3,
    )
    assert series(workdir, "train/share/objective/span_corruption") == [1, 1, 0, 0]
    assert series(workdir, "train/share/objective/prefix_lm") == [0, 0, 1, 1]
    for record in records(workdir):
        if "train/loss" in record:
            kinds = ("objective", "source")
            for kind in kinds:
                assert sum(v for k, v in record.items() if k.startswith(f"train/share/{kind}/")) == pytest.approx(1)
    losses = {k for r in records(workdir) for k in r if k.startswith("eval/loss/")}
    assert losses == {
        "eval/loss/objective/span_corruption",
        "eval/loss/objective/prefix_lm",
        "eval/loss/source/a",
        "eval/loss/source/b",
    }
    first, last = series(workdir, "eval/loss")
    code, evaluated, err = command("evaluate", f"--workdir={workdir}")
    assert code == 0 and last < first and json.loads(evaluated)["eval/loss"] == pytest.approx(last, rel=1e-5), err
    assert "100 % then 0 % of the rows" not in out and "span_corruption of a:" in out
    assert re.findall("---- held-out passage ([0-9]), ([ab]) ----", out) == [*zip("1234", "aabb", strict=True)]


def test_bits_per_byte_are_the_nats_over_the_bytes_of_the_targets(trained):
    from t5like.data.tokenizers.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(trained / "tokenizer.model", num_sentinels=20)
    text = "ba de <extra_id_3> fi\n\u00e9\u4e2d"
    ids = tokenizer.encode_with_sentinels(text)
    assert tokenizer.bytes_V[ids].sum() == len(text.replace("<extra_id_3>", "").encode())
    [last] = [record for record in records(trained) if record["step"] == 2 and "eval/loss" in record]
    bytes_ = last["eval/loss"] * last["eval/tokens"] / np.log(2) / last["eval/bits_per_byte"]
    assert bytes_ == pytest.approx(round(bytes_), abs=0.01) and last["eval/tokens"] < bytes_ < 4 * last["eval/tokens"]
    assert last["eval/perplexity"] == pytest.approx(np.exp(last["eval/loss"]))


# ---- Runs ----


def test_frequent_checkpoints_evaluations_and_a_moving_average_do_not_change_the_training(train, straight):
    often, _ = train(
        "often",
        **CAUSAL,
        optimizer__ema_decay=0.99,
        train__checkpoint_every=5,
        train__eval_every=3,
        train__early_evals=9,
        train__log_every=4,
        data__prefetch=1,
    )
    averaged = leaves(often, 12)
    assert {name: leaf for name, leaf in averaged.items() if not name.startswith("ema/")} == leaves(straight, 12)
    slow, fast = series(often, "eval/loss")[-1], series(straight, "eval/loss")[-1]
    assert slow > fast + 0.1  # the average is evaluated; after 12 steps most of it is still the random beginning
    assert Checkpoints(often / "checkpoints", keep=9).steps() == [5, 10, 12]
    assert [record["step"] for record in records(often) if "eval/loss" in record] == [0, 1, 2, 3, 6, 9, 12]
    assert [record["step"] for record in records(often) if "train/loss" in record] == [4, 8, 12]


def test_a_run_with_another_seed_and_a_schedule_that_never_reaches_its_rate(train, straight):
    unreachable = {"optimizer__schedule": "linear", "optimizer__warmup_steps": 5}
    workdir, out = train("run", **CAUSAL, train__num_steps=1, seed=1, **unreachable)
    assert series(workdir, "train/loss")[0] != series(straight, "train/loss")[0]
    assert "schedule   optimizer.warmup_steps=5 is more than train.num_steps=1: the learning rate ends at" in out


def test_a_complete_run_prints_that_and_changes_nothing(train, trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    before = contents(workdir)
    _, out = train("run", train__num_steps=2, train__checkpoint_every=1)
    assert f"complete   2 of 2 steps are done; nothing is left to train in {workdir}" in out
    assert contents(workdir) == before
    _, out = train("run", train__num_steps=1, train__checkpoint_every=1)
    assert f"complete   2 of 1 steps are done; nothing is left to train in {workdir}" in out
    assert contents(workdir) == before


def test_a_run_continues_with_its_own_config_and_a_larger_number_of_steps(command, straight, half, tmp_path):
    workdir = shutil.copytree(half, tmp_path / "run")
    code, out, _ = command("train", f"--workdir={workdir}", "--config.train.num_steps=12")
    assert code == 0 and "after step 6" in out and "schedule " not in out
    starts = [json.loads(line) for line in (workdir / "provenance.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 6] and starts[0]["fingerprints"] == starts[1]["fingerprints"]
    assert all(starts[0]["fingerprints"][name] in out for name in ("config", "tokenizer", "heldout"))
    assert starts[1]["processor"]["model"] in out
    assert leaves(workdir, 12) == leaves(straight, 12)
    assert series(workdir, "train/loss") == series(straight, "train/loss")


def test_a_run_continues_on_another_mesh_with_the_same_loss(train, straight, half, tmp_path):
    workdir = shutil.copytree(half, tmp_path / "run")
    _, out = train("run", "--fake_devices=8", **CAUSAL, mesh__fsdp=2, mesh__tensor=2)
    assert "after step 6" in out and "data 2 x fsdp 2 x tensor 2" in out
    np.testing.assert_allclose(series(workdir, "train/loss"), series(straight, "train/loss"), rtol=1e-4)
    assert series(workdir, "eval/loss")[-1] == pytest.approx(series(straight, "eval/loss")[-1], rel=1e-4)


def test_a_run_that_diverges_stops_with_its_own_exit_code_and_saves_nothing_bad(command, decoder_flags, tmp_path):
    code, _, err = command(
        "train",
        *decoder_flags,
        f"--workdir={tmp_path}/run",
        "--config.optimizer.learning_rate=1e38",
        "--config.train.checkpoint_every=3",
        "--config.train.max_skipped_updates=2",
    )
    assert code == 5 and err.splitlines()[-1].startswith(
        "t5like: 2 bad steps in a row up to step 2: the update is not finite, although loss and gradient are; "
        "there is no checkpoint before them; lower optimizer.learning_rate"
    )
    assert [record["train/skipped_updates"] for record in records(tmp_path / "run") if "train/loss" in record][-2:] == [
        1,
        1,
    ]
