"""`t5like compare`: configs, metrics and loss curves of runs, also of those that still go on."""

import dataclasses
import fcntl
import json
import struct
from pathlib import Path

import pytest
from conftest import contents

from t5like.config import loader
from t5like.inspect import compare

CONFIG = loader.load("tiny")


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_run(path, *records, learning_rate=0.01, num_steps=20, end="\n"):
    """A run directory with a config and metrics, whose last line may be cut off."""
    path.mkdir(parents=True)
    optimizer = dataclasses.replace(CONFIG.optimizer, learning_rate=learning_rate)
    train = dataclasses.replace(CONFIG.train, num_steps=num_steps)
    (path / "config.json").write_text(loader.to_json(dataclasses.replace(CONFIG, optimizer=optimizer, train=train)))
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + end)
    return path


def measured(step, train, heldout, rate=1000.0):
    return {"step": step, "train/loss": train, "train/tokens_per_second": rate, "eval/loss": heldout}


def test_a_sweep_is_compared_by_what_differs_and_by_final_and_best_metrics(tmp_path, command):
    make_run(tmp_path / "sweep/lr10", measured(10, 5.0, 4.5, 1000.0), measured(20, 4.0, 4.7, 3000.0), learning_rate=0.1)
    make_run(tmp_path / "sweep/lr9", measured(10, 6.0, 5.5), learning_rate=0.09, end='\n{"step": 11, "train/lo')
    make_run(tmp_path / "sweep/lr8", learning_rate=0.08, end="")
    (tmp_path / "sweep/later").mkdir()
    before = contents(tmp_path / "sweep")
    code, out, err = command("compare", "sweep")
    assert code == 0 and "sweep/later holds no run yet" in err
    assert out == (
        "run   optimizer.learning_rate\n"
        "----  -----------------------\n"
        "lr8   0.08\n"
        "lr9   0.09\n"
        "lr10  0.1\n"
        "\n"
        "run   state           step      train/loss  eval/loss  best   at step  bits/byte  tokens/s\n"
        "----  --------------  --------  ----------  ---------  -----  -------  ---------  --------\n"
        "lr8   no metrics yet  0 of 20   -           -          -      -        -          -\n"
        "lr9   stopped         10 of 20  6.000       5.500      5.500  10       -          1,000\n"
        "lr10  done            20 of 20  4.000       4.700      4.500  10       -          2,000\n"
        "\n"
        "Lowest held-out loss: lr10, 4.500 at step 10.\n"
        "loss curves  compare.png\n"
    )
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert contents(tmp_path / "sweep") == before


def test_many_differences_of_few_runs_are_one_line_each(tmp_path, command):
    make_run(tmp_path / "a/run", measured(10, 5.0, 4.5), num_steps=10)
    make_run(tmp_path / "b/run", measured(10, 5.0, 4.4), learning_rate=0.5)
    code, out, _ = command("compare", "a/run", "b/run", "a/run", "--output=two.png")
    assert code == 0 and (tmp_path / "two.png").exists()
    assert out.startswith(
        "config                   a/run  b/run\n"
        "-----------------------  -----  -----\n"
        "optimizer.learning_rate  0.01   0.5\n"
        "train.num_steps          10     20\n"
    )


def test_json_has_the_values_of_the_tables(tmp_path, command):
    make_run(tmp_path / "a", measured(10, 5.0, 4.5), {"step": 20, "train/loss": None})
    make_run(tmp_path / "b", {"step": 0, "eval/loss": 8.0}, measured(20, 5.0, 4.4), learning_rate=0.5)
    code, out, _ = command("compare", "--json", "a", "b")
    comparison = json.loads(out)
    assert code == 0 and comparison["differences"] == {"optimizer.learning_rate": [0.01, 0.5]}
    keys = ("name", "state", "step", "num_steps", "train_loss", "eval_loss", "best_eval_loss", "best_eval_step")
    assert [[run[key] for key in keys] for run in comparison["runs"]] == [
        ["a", "done", 20, 20, None, 4.5, 4.5, 10],
        ["b", "done", 20, 20, 5.0, 4.4, 4.4, 20],
    ]


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ({"noise_density": 0.3}, "The objectives differ: their losses are not comparable."),
        (
            {"tokenizer": "70dc4fd6c7ad"},
            "The tokenizers differ: losses per token are not comparable; bits/byte are, on",
        ),
        ({"heldout": "70dc4fd6c7ad"}, "The held-out texts differ: their losses are not comparable."),
        ({}, "Lowest held-out loss: a, 4.400 at step 10."),
    ],
)
def test_the_best_of_losses_that_are_not_comparable_is_not_named(field, text):
    prints = {"tokenizer": "2230f7b7c573", "heldout": "ea23b0a047a1"}
    for name, own in (("a", {}), ("b", field)):
        path = make_run(Path(name), measured(10, 5.0, 4.4 if name == "a" else 4.5), learning_rate=len(own) + 1)
        (path / "provenance.jsonl").write_text(json.dumps({"fingerprints": prints | own}) + "\n")
    if "noise_density" in field:
        values = json.loads(Path("b/config.json").read_text())
        values["data"] |= field
        Path("b/config.json").write_text(json.dumps(values))
    runs, _ = compare.load([Path("a"), Path("b")])
    assert compare.text(compare.compare(runs)).splitlines()[-1].startswith(text)


def test_the_state_shows_runs_that_go_on_and_runs_that_diverged(tmp_path):
    most = CONFIG.train.max_skipped_updates
    skipped = [{"step": step, "train/loss": None, "train/skipped_updates": 1.0} for step in range(5, 5 + most)]
    make_run(tmp_path / "diverged", *skipped, num_steps=1000)
    going_on = make_run(tmp_path / "going_on", measured(10, 5.0, 4.5))
    with (going_on / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        runs, _ = compare.load([tmp_path])
        states = {run.name: compare.state(run) for run in runs}
    assert states == {"diverged": "diverged", "going_on": "running"}


def test_runs_with_rewards_have_their_own_table_and_plot_and_losses_of_other_methods_are_not_ranked(tmp_path):
    policy = dataclasses.replace(CONFIG, rl=dataclasses.replace(CONFIG.rl, method="policy"))
    answers = [
        {"step": step, "train/loss": -0.1, "train/reward": step / 10, "eval/reward": reward, "train/kl": 0.0123}
        for step, reward in ((5, 0.5), (10, 0.75), (20, 0.75))
    ]
    runs = [
        compare.Run("pretraining", tmp_path / "a", CONFIG, [measured(20, 5.0, 4.5)], False),
        compare.Run("rl", tmp_path / "b", policy, answers, False),
    ]
    comparison = compare.compare(runs)
    names = ("reward", "eval_reward", "best_eval_reward", "best_eval_reward_step", "kl")
    assert [comparison["runs"][1][name] for name in names] == [2.0, 0.75, 0.75, 10, 0.0123]
    assert (
        "run  train/reward  eval/reward  best   at step  KL\n"
        "---  ------------  -----------  -----  -------  ------\n"
        "rl   2.000         0.750        0.750  10       0.0123"
    ) in compare.text(comparison)
    both = [runs[0], runs[1]._replace(records=[measured(20, 0.6, 0.7)])]
    text = compare.text(compare.compare(both))
    assert "The methods differ" in text and "Lowest" not in text
    compare.draw(runs, tmp_path / "two.png")
    compare.draw(runs[:1], tmp_path / "one.png")
    sizes = [struct.unpack(">I", (tmp_path / name).read_bytes()[16:20])[0] for name in ("two.png", "one.png")]
    assert sizes == [1800, 1200]  # pixels wide: one plot for losses, one for rewards


def test_losses_of_different_tokenizers_are_not_ranked(tmp_path):
    other = dataclasses.replace(CONFIG, tokenizer=dataclasses.replace(CONFIG.tokenizer, vocab_size=300))
    runs = [
        compare.Run(name, tmp_path / name, config, [measured(20, 5.0, 4.5) | {"eval/bits_per_byte": 1.25}], False)
        for name, config in (("a", CONFIG), ("b", other))
    ]
    text = compare.text(compare.compare(runs))
    assert "The tokenizers differ" in text and "Lowest" not in text and "1.250" in text


def test_a_real_run_is_compared(trained, command):
    code, out, _ = command("compare", trained)
    assert code == 0 and out.splitlines()[2].split()[:5] == [trained.name, "done", "2", "of", "2"]


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        (lambda run: None, 4, "RUN=x can't be read: No such file or directory; use the directory of a run"),
        (lambda run: run.mkdir(), 4, "RUN=x holds no run, and no directories of runs; train first, or check the path"),
        (lambda run: make_run(run, end='{"step": "a"}\nb\n'), 3, "x/metrics.jsonl:1 must be a JSON object"),
        (lambda run: (make_run(run) / "config.json").write_text("{"), 4, "x/config.json can't be read: "),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(tmp_path, refused, make, code, message):
    make(tmp_path / "x")
    result, text = refused("compare", "x")
    assert result == code and text.startswith(message)
    assert not (tmp_path / "compare.png").exists()


def test_a_picture_inside_a_run_is_refused(tmp_path, refused):
    make_run(tmp_path / "a", measured(10, 5.0, 4.5))
    code, text = refused("compare", "a", "--output=a/new.png")
    assert code == 2 and text == "--output=a/new.png lies in the run a, which is not changed; use another path"
    assert not (tmp_path / "a/new.png").exists()
