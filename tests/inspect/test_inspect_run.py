"""`t5like inspect run`: whether a run is healthy, what happened in it, and its page; broken runs are named as such."""

import dataclasses
import fcntl
import json
import math
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from t5like.checkpoint import provenance
from t5like.config import loader
from t5like.data import pipeline
from t5like.inspect import health, run, run_files, run_page, run_time
from t5like.sharding import placement

CONFIG = loader.load("tiny")
# An encoder compiles fastest, and generates no samples.
QUICK = [f"--config.{field}" for field in ("model.architecture=encoder", "data.objective=mlm", "train.eval_batches=1")]


def write_run(path, records, **fields) -> None:
    """A run directory with a config and metrics."""
    path.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **fields))
    (path / "config.json").write_text(loader.to_json(config))
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def healthy(steps=range(10, 401, 10)) -> list[dict]:
    """Records of a run in which nothing is wrong."""
    return [
        {"step": 0, "baseline/uniform": 8.3, "baseline/unigram": 6.5, "eval/loss": 8.4},
        *(
            {
                "step": step,
                "train/loss": 2 + 6 / math.sqrt(step),
                "train/grad_norm": 1.0,
                "train/learning_rate": 0.01,
                "train/skipped_updates": 0.0,
                "train/tokens_per_second": 1000.0,
                "train/step_seconds": 0.1,
                "time/device": 0.8,
                "time/data": 0.1,
                "time/host": 0.1,
                **({"eval/loss": 2.1 + 6 / math.sqrt(step)} if step % 100 == 0 else {}),
            }
            for step in steps
        ),
    ]


def report_of(path, records, **fields) -> run.Report:
    write_run(path, records, **fields)
    return run.read_report(path)


class Texts(HTMLParser):
    """The visible text of a page, and its elements and attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.text, self.tags, self.attributes = "", [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_a_run_is_described_by_verdict_time_starts_changes_checkpoints_bad_steps_and_losses(command, trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    code, out, _ = command("inspect", "run", f"--workdir={workdir}", "--verify")
    lines = run.describe(run.read_report(workdir, verify=True))
    assert code == 0 and out.splitlines() == lines
    assert lines[0] == f"run        {workdir}" and "config     data.batch_size=8" in lines
    assert lines[1] == "verdict    nothing is wrong so far, but 2 steps say little"
    assert "state      done, step 2 of 2" in lines
    assert not any("config     train.z_loss" in line for line in lines)  # at its default
    assert "saved      steps 1, 2; 0 rewinds; newest: good" in lines
    assert sum(line.startswith("start      ") and line.endswith("t5like 0.1.0") for line in lines) == 1
    assert any(re.fullmatch(r"time       .*start \d+%.* of \d+(\.\d+)? .*", line) for line in lines), lines
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    [last] = [record["eval/loss"] for record in records if record["step"] == 2 and "eval/loss" in record]
    assert lines[-1] == f"loss       {last:.4f} at step 2, held out"

    change = "optimizer.learning_rate: 0.01 -> 0.005"
    provenance.append(workdir, 2, {"versions": {"t5like": "0.1.0"}, "changes": [change]})
    (workdir / "bad_steps" / "3").mkdir(parents=True)
    (workdir / "bad_steps" / "3" / "step.json").write_text(json.dumps({"reason": "the loss is not finite"}))
    (workdir / "metrics.jsonl").open("a").write('{"step": 3, "train/loss": null}\n')
    lines = run.describe(run.read_report(workdir))
    assert f"change     {change}" in lines and "bad step   3: the loss is not finite" in lines
    assert "loss       not finite at step 3, training" in lines


def test_a_learning_rate_100_times_too_high_is_named(decoder_flags, command, tmp_path):
    settings = ["--config.optimizer.learning_rate=1", "--config.train.num_steps=40"]
    assert command("train", *decoder_flags, *QUICK, *settings, f"--workdir={tmp_path}/run")[0] == 0
    code, out, _ = command("inspect", "run", f"--workdir={tmp_path}/run")
    assert code == 0 and re.search(r"^verdict    not healthy: \d problems?", out, re.MULTILINE), out
    assert re.search(r"^problem    the loss is \d+\.\d+, above the \d\.\d+ of a uniform guess$", out, re.MULTILINE), out
    assert "lower optimizer.learning_rate (1; try 0.1)" in out


def test_a_run_that_waits_for_data_and_skips_updates_is_named(decoder_flags, command, tmp_path, monkeypatch):
    to_global, prefetch, places = placement.to_global, pipeline.prefetch, []

    def slow(batches, start, stop, rows):
        for batch in prefetch(batches, start, stop, rows):
            time.sleep(0.03)
            yield batch

    def poisoned(batch, mesh, batch_size):
        places.append(batch)
        if len(places) == 20:  # one batch of training: its loss is NaN
            batch = batch._replace(weights_BL=np.full_like(batch.weights_BL, np.nan))
        return to_global(batch, mesh, batch_size)

    monkeypatch.setattr(pipeline, "prefetch", slow)
    monkeypatch.setattr(placement, "to_global", poisoned)
    settings = ["--config.train.num_steps=24", "--config.train.keep_bad_steps=0"]
    assert command("train", *decoder_flags, *QUICK, *settings, f"--workdir={tmp_path}/a run")[0] == 0
    _, out, _ = command("inspect", "run", f"--workdir={tmp_path}/a run")
    assert f"t5like replay --workdir='{tmp_path}/a run' --step=" in out
    assert re.search(r"^problem    steps wait for data \d\d% of their time$", out, re.MULTILINE), out
    assert "raise data.num_workers" in out
    assert re.search(r"^problem    1 updates were skipped \(4\.2% of the steps\): steps \d+$", out, re.MULTILINE), out
    assert "not healthy: 2 problems" in out and "skipped    1 updates, 0 spikes" in out


def changed(records, **values):
    """Records whose last quarter has other values; names with __ for /."""
    names = {name.replace("__", "/"): value for name, value in values.items()}
    late = len(records) * 3 // 4
    return records[:late] + [{**record, **names} for record in records[late:]]


@pytest.mark.parametrize(
    ("records", "fields", "kind", "text"),
    [
        (changed(healthy(), train__loss=4.0), {}, "bad", "the training loss rose from 2.3"),
        (changed(healthy(), eval__loss=3.0), {}, "warning", "the held-out loss rose from 2.524 to 3.000"),
        (changed(healthy(), train__loss=7.0, eval__loss=7.0), {}, "warning", "not below the 6.500 of guessing"),
        (changed(healthy(), train__grad_norm=50.0), {}, "warning", "the gradient norm rose to 50"),
        (changed(healthy(), train__spikes=1.0), {}, "warning", "11 steps were spikes: 300, 310, 320"),
        (changed(healthy(), train__tokens_per_second=300.0), {}, "warning", "the speed fell from 1,000 to 300"),
        (changed(healthy(), time__save=90.0), {}, "warning", "% of the time goes into save"),
        (changed(healthy(), train__skipped_updates=1.0), {"num_steps": 500}, "bad", "the run diverged at step 400"),
        (healthy(), {"checkpoint_every": 100}, "bad", "no checkpoint after 400 steps"),
        (
            changed(healthy(), stats__decoder__layer_1__update_ratio=0.3),
            {},
            "bad",
            "most decoder/layer_1: 0.3 of its norm",
        ),
    ],
)
def test_each_rule_names_what_is_wrong_and_a_healthy_run_has_no_findings(tmp_path, records, fields, kind, text):
    fields = {"num_steps": 400, "checkpoint_every": 400, **fields}
    report = report_of(tmp_path / "run", records, **fields)
    found = [finding for finding in report.findings if text in finding.what]
    assert [finding.kind for finding in found] == [kind], report.findings
    assert all(finding.rule and finding.remedy for finding in report.findings)
    write_run(tmp_path / "run", healthy(), num_steps=400, checkpoint_every=400)
    report = run.read_report(tmp_path / "run")
    assert report.findings == [] and health.verdict(report.run, []) == "healthy"


def test_losses_that_differ_by_chance_have_no_trend(rng):
    trends = []
    for count in (24, 40, 400):
        for _ in range(30):
            losses = rng.normal(3.0, 0.2, count)
            records = [{"step": step, "train/loss": loss} for step, loss in enumerate(losses, 1)]
            whole = run_files.Run("a", Path("a"), CONFIG, records, False)
            events = run_files.Events([], [], None, {})
            found = health.findings(whole, events, run_time.time_use(whole, events))
            assert not [finding for finding in found if "rose" in finding.what], losses
            trends.append(health.trend(losses))
    assert trends.count("flat") > 0.9 * len(trends)
    assert health.trend(np.linspace(3, 2, 40) + rng.normal(0, 0.01, 40)) == "falling"


def test_data_that_the_devices_wait_for_counts_and_data_behind_busy_devices_does_not(tmp_path):
    records = [{**record, "time/data": 0.8, "time/device": 0.4} for record in healthy()[1:]]
    assert report_of(tmp_path / "busy", records).use.goodput == pytest.approx(1)
    report = report_of(tmp_path / "idle", [{**record, "time/device": 0.01} for record in records])
    assert "steps wait for data 88% of their time" in [finding.what for finding in report.findings]
    assert report.use.goodput == pytest.approx(0.11 / 0.91)


def test_goodput_counts_what_a_restart_has_undone_and_a_running_run_has_an_end(tmp_path):
    records = [{"step": 10, "time/undone": 60.0, "time/start": 20.0}, *healthy(range(20, 41, 10))[1:]]
    write_run(tmp_path / "run", records, num_steps=140)
    assert run.read_report(tmp_path / "run").use.goodput == pytest.approx(3 / 83)
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lines = run.describe(run.read_report(tmp_path / "run"))
    assert any(re.match("state      running, step 40 of 140; it ends in about 10 s, at 2", line) for line in lines)
    lines = run.describe(run.read_report(tmp_path / "run"))
    assert "state      stopped, step 40 of 140; not running: the same command continues it, for about 10 s" in lines


def test_the_page_has_verdict_plots_and_samples_loads_nothing_and_escapes_all_text(tmp_path, command):
    records = [
        {
            **record,
            "train/loss/source/<script>a": 3.0,
            "train/loss/source/b": 4.0,
            "stats/encoder/update_ratio": 0.001,
        }
        for record in changed(healthy(), train__loss=4.0)
    ]
    write_run(tmp_path / "run", records, num_steps=400)
    (tmp_path / "run" / "samples.txt").write_text("---- passage ----\n<img src=http://example.org/x>\x1b[31m\n")
    (tmp_path / "run" / "samples").mkdir()
    for step in range(0, 1100, 100):
        (tmp_path / "run" / "samples" / f"{step}.txt").write_text(f"prediction {step}\n")
    code, _, err = command("inspect", "run", f"--workdir={tmp_path}/run", f"--html={tmp_path}/run.html")
    page = (tmp_path / "run.html").read_text()
    assert code == 0 and err.splitlines()[-1] == f"page       {tmp_path}/run.html"
    parsed = Texts(page)
    assert "the training loss rose from 2.3" in parsed.text and "Rule: the median of the last eighth" in parsed.text
    for title in ("Loss", "Training loss by source", "Learning rate", "Gradient norm", "Throughput", "Time of a step"):
        assert title in parsed.text
    assert "<script>a" in parsed.text and "<img src=http://example.org/x>\\u001b[31m" in parsed.text
    assert re.findall(r"prediction (\d+)", parsed.text) == ["0", "200", "500", "700", "1000"]
    assert not {"script", "img", "link", "iframe", "object"} & set(parsed.tags)
    assert {name for name, _ in parsed.attributes} & {"src", "onload", "onclick"} == set()
    assert all(value.startswith("#") for name, value in parsed.attributes if name == "href")
    assert parsed.tags.count("svg") > 8 and parsed.tags.count("polyline") > 8
    assert len(page) < 200_000


def test_the_page_of_sampled_answers_has_rewards_and_answers(tmp_path):
    records = [
        {
            "step": step,
            "train/reward": step / 10,
            "train/kl": 0.01,
            "train/loss": -0.1,
            "train/failed_rewards": step % 2 * 8.0,
        }
        for step in range(1, 31)
    ]
    write_run(tmp_path / "run", records)
    values = json.loads((tmp_path / "run" / "config.json").read_text())
    values["rl"] |= {
        "method": "policy",
        "rewards": ["length"],
        "max_kl": 0.015,
        "reference": "first",
        "answers_per_prompt": 8,
    }
    values["data"] |= {"batch_size": 8, "objective": ["supervised"]}
    (tmp_path / "run" / "config.json").write_text(json.dumps(values))
    (tmp_path / "run" / "answers").mkdir()
    answer = {"prompt": "sort b a", "answer": "a b <i>", "reward": 1.0}
    (tmp_path / "run" / "answers" / "10.jsonl").write_text(json.dumps(answer) + "\n")
    report = run.read_report(tmp_path / "run")
    assert [finding.what for finding in report.findings] == [
        "6.2% of the rewards failed",
        "the KL divergence from the first weights is 0.01 per token",
    ]
    assert [finding.kind for finding in report.findings] == ["bad", "warning"]
    text = Texts(run_page.run_page(report)).text
    assert "KL divergence from the first weights" in text and "Reward" in text and "a b <i>" in text


def test_damaged_and_missing_metrics_are_one_line(tmp_path, command, refused):
    write_run(tmp_path / "run", [])
    code, out, _ = command("inspect", "run", f"--workdir={tmp_path}/run")
    assert code == 0 and "verdict    no metrics yet" in out
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\nx\n")
    code, text = refused("inspect", "run", f"--workdir={tmp_path}/run")
    assert code == 3 and "metrics.jsonl:1 must be a JSON object" in text
    code, text = refused("inspect", "run", f"--workdir={tmp_path}/run", f"--html={tmp_path}/run/page.html")
    assert code == 3


def test_a_page_inside_the_run_is_refused(tmp_path, refused):
    write_run(tmp_path / "run", healthy())
    code, text = refused("inspect", "run", f"--workdir={tmp_path}/run", f"--html={tmp_path}/run/page.html")
    assert code == 2 and text.startswith(f"--html={tmp_path}/run/page.html lies in the run {tmp_path}/run")
    assert not (tmp_path / "run" / "page.html").exists()
