"""Bad batches in a real run: skipped, passed over after a rewind, recorded, repeated by a resume; then the dead end."""

import json
import os
import re
import signal

import numpy as np
import pytest
from conftest import DECODER

from t5like import tree
from t5like.checkpoint.checkpoints import Checkpoints
from t5like.data.row_schedule import Segment
from t5like.optim import step
from t5like.sharding import placement
from t5like.train import rewind

SETTINGS = {
    **DECODER,  # takes half as long to compile
    "train.num_steps": 6,
    "train.checkpoint_every": 2,
    "train.max_skipped_updates": 3,
    "train.max_rewinds": 1,
    "train.eval_batches": 1,
}


class Poison:
    """A `placement.to_global` that makes the loss of chosen batches NaN, by their content, in whatever run they occur.

    Attributes:
        tokens: the first row of each chosen batch.
        seen: the first row of each batch that was trained on, in order.
    """

    def __init__(self, places):
        self.places, self.tokens, self.seen, self._to_global = set(places), set(), [], placement.to_global
        self._heldout = None

    def __call__(self, batch, mesh, batch_size):
        row = batch.targets_BL[0].tobytes()
        self._heldout = self._heldout or row  # a run begins with an evaluation
        if row != self._heldout and row not in self.seen[-1:]:  # the evidence places a batch again
            if len(self.seen) in self.places:
                self.tokens.add(row)
            self.seen.append(row)
        if row in self.tokens:
            batch = batch._replace(weights_BL=np.full_like(batch.weights_BL, np.nan))
        return self._to_global(batch, mesh, batch_size)


@pytest.fixture
def train(command, flags, tmp_path):
    def run(name, *more, **values):
        settings = [f"--config.{field}={value}" for field, value in (SETTINGS | values).items()]
        return command("train", *flags, f"--workdir={tmp_path}/{name}", *settings, *more)

    return run


def saved(workdir):
    return Checkpoints(workdir / "checkpoints", keep=9).meta()


def test_a_run_passes_over_bad_batches_and_repeats_that_exactly_when_it_is_resumed(train, tmp_path, monkeypatch):
    poison = Poison({2, 3, 4})
    monkeypatch.setattr(placement, "to_global", poison)
    code, _, err = train("run")
    assert code == 0, err
    assert "rewind     to step 2; the batches up to step 5 are passed over" in err
    assert err.count("the loss is not finite, update skipped") == 3

    meta, workdir = saved(tmp_path / "run"), tmp_path / "run"
    assert meta.step == 6 and meta.history.rewinds == 1 and meta.history.bad_steps == 0
    assert meta.history.rows.segments == (Segment(0, 0, 8), Segment(2, 40, 8))
    assert len(poison.seen) == len(set(poison.seen)) == 6 + 3  # no batch occurs twice: three were passed over
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "train/loss" in record]
    assert steps == list(range(1, 7)) and all(record.get("train/loss", 1) is not None for record in records)

    # The evidence: the first bad step has rows 16 to 23, and its norms are not finite.
    assert sorted(path.name for path in (workdir / "bad_steps").iterdir()) == ["3", "4", "5"]
    evidence = json.loads((workdir / "bad_steps" / "3" / "step.json").read_text())
    assert (evidence["step"], evidence["checkpoint"], evidence["first_row"]) == (3, 2, 16)
    assert evidence["loss"] == "nan" and evidence["reason"] == "the loss is not finite"
    assert evidence["grad_norm_by_parameter"]["decoder/layers/mlp/out/kernel"] == ["nan"]
    texts = [json.loads(line) for line in (workdir / "bad_steps" / "3" / "text.jsonl").read_text().splitlines()]
    assert [line["row"] for line in texts] == list(range(16, 24)) and all("<extra_id_0>" in t["inputs"] for t in texts)
    assert np.load(workdir / "bad_steps" / "3" / "rows.npz")["targets_BL"][0].tobytes() in poison.tokens

    # Stopped among the bad steps.
    assert train("resumed", **{"train.num_steps": 4, "train.keep_bad_steps": 0})[0] == 0
    assert saved(tmp_path / "resumed").history.bad_steps == 2
    assert train("resumed", **{"train.keep_bad_steps": 0})[0] == 0
    again = saved(tmp_path / "resumed")
    assert again.leaves == meta.leaves and again.history == meta.history


def test_after_too_many_rewinds_the_run_ends_and_continues_with_a_lower_rate(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(placement, "to_global", Poison(range(2, 100)))
        code, _, err = train("run", **{"train.keep_bad_steps": 0})
    *_, message = err.splitlines()
    assert code == 5
    assert "3 bad steps in a row up to step 5: the loss is not finite; the run has gone back 1 times" in message
    assert "--config.optimizer.learning_rate=0.005 --allow_change=optimizer.learning_rate" in message
    assert (saved(tmp_path / "run").step, saved(tmp_path / "run").history.rewinds) == (4, 1)

    lower = {"optimizer.learning_rate": 0.005, "data.batch_size": 16}
    code, _, err = train("run", **lower)
    assert code == 2 and err.endswith(
        "holds another run: data.batch_size: 8 -> 16; optimizer.learning_rate: 0.01 -> 0.005; add "
        "--allow_change=data.batch_size,optimizer.learning_rate to change it from here on, or use another --workdir\n"
    )
    code, out, err = train("run", "--allow_change=optimizer.learning_rate,data.batch_size", **lower)
    assert code == 0, err
    assert "change     optimizer.learning_rate: 0.01 -> 0.005 from step 4 on" in out
    *_, record = [json.loads(line) for line in (tmp_path / "run" / "provenance.jsonl").read_text().splitlines()]
    assert record["step"] == 4 and "optimizer.learning_rate: 0.01 -> 0.005" in record["changes"]
    meta = saved(tmp_path / "run")
    assert meta.step == 6 and meta.config.optimizer.learning_rate == 0.005 and meta.history.rewinds == 0
    assert meta.history.rows.segments == (Segment(0, 0, 8), Segment(2, 40, 8), Segment(4, 56, 16))
    assert train("run", **lower)[0] == 0  # complete, without the flag

    code, _, err = train("run", **lower, **{"model.mlp_dim": 128})
    assert code == 2 and err.endswith("model.mlp_dim: 64 -> 128; use another --workdir\n")
    code, _, err = train("run", "--allow_change=model.mlp_dim", **lower)
    assert code == 2 and "--allow_change=model.mlp_dim must be a field that may change while a run continues" in err


class SpoiledMoment:
    """A `step.compile_train_step` whose step makes one second moment infinite after chosen batches, by their content.

    Attributes:
        places: indices of the chosen batches, in the order of their first use.
        rows: the first row of each chosen batch.
        signal_at: index of the batch after which the process receives SIGTERM; None: none.
    """

    def __init__(self, places):
        self.places, self.rows, self.signal_at = set(places), set(), None
        self._count, self._compile = 0, step.compile_train_step

    def __call__(self, *arguments):
        compiled = self._compile(*arguments)

        def spoiled(state, batch):
            row = np.asarray(batch.targets_BL)[0].tobytes()
            state, metrics = compiled(state, batch)
            self.rows |= {row} if self._count in self.places else set()
            if self._count == self.signal_at:
                os.kill(os.getpid(), signal.SIGTERM)
            self._count += 1
            if row in self.rows:
                damage = lambda name, leaf: leaf.at[0, 3].set(np.inf) if name.endswith("nu/embedding") else leaf
                state = state._replace(opt_state=tree.map_named(damage, state.opt_state))
            return state, metrics

        return spoiled


def test_a_state_with_an_infinite_second_moment_is_not_saved_and_the_run_goes_back(train, tmp_path, monkeypatch):
    spoiled = SpoiledMoment({3})
    monkeypatch.setattr(step, "compile_train_step", spoiled)
    code, _, err = train("run")
    assert code == 0, err
    assert re.search(r"step 4: the state is not finite in opt_state/\S+nu/embedding, not saved", err)
    assert "rewind     to step 2; the batches up to step 4 are passed over" in err
    meta = saved(tmp_path / "run")
    assert meta.step == 6 and meta.history.rewinds == 1 and meta.history.bad_steps == 0
    assert meta.history.rows.segments == (Segment(0, 0, 8), Segment(2, 32, 8))

    assert train("resumed", **{"train.num_steps": 4})[0] == 0  # goes back at its last step
    assert saved(tmp_path / "resumed").history.rows.segments == meta.history.rows.segments
    assert train("resumed")[0] == 0
    again = saved(tmp_path / "resumed")
    assert again.leaves == meta.leaves and again.history == meta.history


def test_a_run_that_is_stopped_with_a_state_that_is_not_finite_keeps_the_checkpoint_before(
    train, tmp_path, monkeypatch
):
    spoiled = SpoiledMoment({2})
    spoiled.signal_at = 2
    monkeypatch.setattr(step, "compile_train_step", spoiled)
    code, _, err = train("run")
    assert code == 75 and "stopped by a signal after step 2; saved in" in err
    assert saved(tmp_path / "run").step == 2
    code, _, err = train("run", **{"train.max_rewinds": 0})
    message = (
        r"a bad step up to step 4: the state is not finite in opt_state/\S+nu/embedding; the run has gone back 0 t"
    )
    assert code == 5 and re.search(message, err), err


SPIKE = "loss 2.000 and gradient norm 90 are a spike"


@pytest.mark.parametrize(
    "values, reason",
    [
        ((2.0, 1.0, 0.0, None), None),
        ((2.0, 1.0, 0.0, 0.0), None),
        ((np.nan, np.nan, 1.0, None), "the loss is not finite"),
        ((2.0, np.inf, 1.0, 0.0), "the gradient is not finite"),
        ((2.0, 1.0, 1.0, 0.0), "the update is not finite, although loss and gradient are"),
        ((2.0, 90.0, 1.0, 1.0), SPIKE),
        ((2.0, 90.0, 0.0, 1.0), SPIKE),
    ],
)
def test_the_reason_of_a_bad_step_follows_from_its_metrics(values, reason):
    names = ("loss", "grad_norm", "skipped_updates", "spikes")
    metrics = {f"train/{name}": value for name, value in zip(names, values, strict=True) if value is not None}
    assert rewind.describe(metrics) == reason
