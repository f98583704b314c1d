"""The scripts of benchmarks/ run to their end at toy sizes; next to PyTorch they do in tests/live."""

import functools
import io
import json
import os
import sys

import pytest
from conftest import first_devices
from documents import ROOT

from t5like.config import loader
from t5like.data import pipeline

TOY = [  # of the smallest model, on data that the fixtures have prepared
    "--config.tokenizer.num_sentinels=40",
    "--config.data.inputs_length=64",
    "--config.data.targets_length=40",
    "--config.data.batch_size=8",
    "--config.model.layers=unroll",
]


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """Benchmarks import each other as scripts do, on two devices; those of one config share a trainer."""
    with pytest.MonkeyPatch.context() as patch, first_devices(2):
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import checks
        import saving
        import train_step

        shared = functools.cache(train_step.Trainer)
        for module in (train_step, saving, checks):
            patch.setattr(module, "Trainer", shared)
        yield


def lines(text: str) -> list[dict]:
    """What a benchmark printed; each of its lines is a JSON object."""
    return [json.loads(line) for line in text.splitlines()]


def test_the_training_step_is_measured_alone_and_on_request(capfd, monkeypatch):
    import peers
    import train_step

    program, path, serve, *command = peers.t5like_command(peers.SHAPES["toy_dec"], peers.parse(["--rounds=1"]))
    assert (program, path, serve) == (sys.executable, str(ROOT / "benchmarks/train_step.py"), "--serve")
    train_step.main([*command, "--steps=2", "--profile"])
    out, err = capfd.readouterr()
    machine, start, speed = lines(out)
    assert "profile    steps 1 to 3 on" in err and "matrix products" in err
    embeddings, attention, mlp, norms = 2 * 512 * 64, 4 * 64 * 64, 3 * 64 * 64, 3 * 64
    assert start["params"] == embeddings + attention + mlp + norms and 5 < start["loss"] < 8
    assert machine["cpu"] and machine["devices"] == 2 and machine["dtype"] == "float32"
    assert min(start["lower_s"], start["compile_s"], speed["tokens_per_second"], speed["step_ms"], speed["cpu_ms"]) > 0

    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n2\n"))
    train_step.main([*command, serve])
    _, _, first, second, last = lines(capfd.readouterr().out)
    assert len(first["step_ms"]) == 1 and len(second["step_ms"]) == 2 and last["peak_rss_mb"] > 0


def test_every_shape_has_a_config_that_loads():
    import accelerator_shapes
    import measurement
    import peers

    commands = [(shape, peers.t5like_command(shape, peers.parse([]))[3:]) for shape in peers.SHAPES.values()]
    for shape in accelerator_shapes.SHAPES.values():
        fields = accelerator_shapes.fields(shape, accelerator_shapes.Attempt(4, "none"), "bfloat16")
        path = f"--config={accelerator_shapes.CONFIGS / shape.config}"
        commands.append((shape, [path, *(f"--config.{field}={value}" for field, value in fields)]))
    for shape, (config, *fields) in commands:
        batch = pipeline.spec(loader.load(config.partition("=")[2], measurement.split(fields)[1]))
        assert batch.targets_BL.shape[1] == (shape.targets or shape.inputs)


def test_the_cost_of_a_save_is_measured(capfd):
    import peers
    import saving

    arguments = peers.t5like_command(peers.SHAPES["toy_dec"], peers.parse(["--rounds=1"]))[3:]
    saving.main([*arguments, "--rounds=1", "--steps=1"])
    machine, alone, steps = lines(capfd.readouterr().out)
    assert machine["devices"] == 2 and alone["state_mb"] > 0 and 0 < alone["stall_s"] < alone["save_s"]
    assert steps["steps_at_5_percent"] == pytest.approx(20 * steps["added_cpu_s"] / steps["cpu_step_s"], rel=1e-2)


def test_the_cost_of_the_checks_is_measured(capfd):
    import checks
    import peers

    arguments = peers.t5like_command(peers.SHAPES["toy_dec"], peers.parse(["--rounds=1"]))[3:]
    checks.main([*arguments, "--rounds=1", "--steps=1"])
    machine, spikes, replicas, layers, *in_cpu_time = lines(capfd.readouterr().out)
    assert machine["devices"] == 2 and len(spikes["shares"]) == 1 and spikes["step_ms"] > 0 < replicas["compare_ms"]
    assert replicas["share"] == pytest.approx(replicas["compare_ms"] / (100 * spikes["step_ms"]), rel=1e-2)
    assert layers["share"] == pytest.approx(layers["compute_ms"] / (100 * spikes["step_ms"]), rel=1e-2)
    assert [each["check"] for each in in_cpu_time] == ["spikes", "replicas", "statistics"]
    assert in_cpu_time[1]["cpu_compare_ms"] > 0 < in_cpu_time[2]["cpu_compute_ms"]


def test_learning_is_measured_against_processor_time(flags, tmp_path, capfd):
    import learning
    import numpy as np

    with first_devices(1):
        learning.main([*flags, "--recipe=t5like", "--seed=1", "--steps=2", f"--files={tmp_path}"])
    points = lines(capfd.readouterr().out)
    assert [point["step"] for point in points] == [0, 1, 2] and 5 < points[0]["loss"] < 8 and points[2]["cpu_s"] > 0
    with np.load(tmp_path / "train.npz") as rows, np.load(tmp_path / "weights.npz") as weights:  # for the others
        assert rows["inputs"].shape == (8 * 2 * learning.SPARE, 32) and weights["shared.weight"].shape == (400, 32)
    points = [point | {"tokens": 44 * 8 * point["step"]} for point in points]
    learning.draw(points, tmp_path / "learning.png")
    assert (tmp_path / "learning.png").stat().st_size > 1000
    assert f"| t5like | {2:5} | {704:6} |" in learning.table(points)


def test_settings_are_compared_by_their_heldout_loss(flags, tmp_path, capfd):
    import sweep

    (tmp_path / "settings.txt").write_text("# comment\nslow --config.optimizer.learning_rate=1e-9\nfast\n")
    stored = {"name": "slow", "flags": "", "steps": 1, "held-out loss": 9.0, "accuracy": 0.0, "bits per byte": 9.0}
    for name, loss in (("slow", 9.0), ("fast", 8.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sweep.json").write_text(json.dumps(stored | {"name": name, "held-out loss": loss}))
    sweep.main([f"{tmp_path}/settings.txt", f"--workdir={tmp_path}"])
    out, err = capfd.readouterr()
    assert [line["name"] for line in lines(out)] == ["slow", "fast"]  # complete runs are not made again
    assert err.index("| fast") < err.index("| slow")


def test_activations_are_compared_over_widths():
    import widths

    with first_devices(1):
        measured = widths.sizes(str(ROOT / "configs/t5_small.py"), 64, "adafactor 0.01", steps=1)
    assert {"encoder residual", "decoder cross_attention_output", "decoder mlp_hidden", "logits"} <= set(measured)
    assert all(0 < before != after > 0 for before, after in measured.values())
    results = {("rule", width): {"residual": [1.0, width**0.5]} for width in (64, 128, 256)}
    [row] = widths.rows(results, [64, 128, 256])
    assert row["exponent"] == pytest.approx(0.5) and row["exponent before"] == pytest.approx(0) and row["128"] > 11


def test_steps_are_timed_by_window_pattern(capfd, monkeypatch):
    import windows

    monkeypatch.setattr(windows, "PATTERNS", {"full": (), "all local": ("local",)})
    with first_devices(1):
        windows.main(["--length=256", "--window=16", "--dim=16", "--rows=1", "--rounds=1", "--layers=1"])
    machine, full, local = lines(capfd.readouterr().out)
    assert machine["jax"] and local["step ms"] > 0 and full["of full"] == 1
    assert all(local[count] < full[count] for count in ("model GFLOP", "XLA's GFLOP"))


def test_decoding_of_ours_is_measured_on_request(capfd, monkeypatch):
    import generate

    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n"))
    generate.main(["--serve=t5like", '--case={"shape": "toy_dec", "rows": 2, "way": "greedy"}'])
    machine, start, first, last = lines(capfd.readouterr().out)
    assert machine["jax"] and start["sum_gbps"] > 0 and len(first["step_ms"]) == 1 and last["peak_rss_mb"] > 0


def test_rollouts_are_measured_beside_generate(trained, capfd):
    import rollouts

    with first_devices(1):
        rollouts.main([f"--workdir={trained}", "--prompts=2", "--answers=2", "--rounds=1"])
    machine, rollout, *others = lines(capfd.readouterr().out)
    assert machine["jax"] and machine["cores"] > 0
    assert rollout["rollout's time / this"] == rollout["processor time per token"] == 1 and len(others) == 2
    assert min(each["processor time per token"] for each in others) > 0
    assert min(each["tokens/s"] for each in (rollout, *others)) > 0


def test_finished_batches_of_every_objective_are_measured(flags, texts, tmp_path, capfd):
    import input_pipeline

    words = (texts / "a.txt").read_text().splitlines()[:40]
    examples = [json.dumps({"inputs": text, "targets": text.split()[0]}) + "\n" for text in words]
    (tmp_path / "examples.jsonl").write_text("".join(examples))
    cores = os.sched_getaffinity(0)
    input_pipeline.main([*flags, *TOY, "--seconds=0", f"--examples=jsonl:{tmp_path}/examples.jsonl"])
    out, err = capfd.readouterr()
    machine, *cases = lines(out)
    assert machine["rows"] == 8 and len(cases) == 22 and all(case["tokens_per_second"] > 0 for case in cases)
    assert {case["objective"] for case in cases} >= {"span_corruption", "mlm_nsp", "ul2", "supervised"}
    assert err.count("\n| ") >= 23 and os.sched_getaffinity(0) == cores


def test_making_and_reading_a_token_store_are_measured(flags, capfd):
    import token_store

    token_store.main([*flags, "--rounds=1"])
    machine, reading, own, jsonl = lines(capfd.readouterr().out)
    assert machine["sentencepiece"] and reading["windows_tokens_per_second"] > 0
    assert own["source"].startswith("text:") and jsonl["documents"] == 8 * own["documents"] and own["ratio"] > 0


def test_a_mistake_is_one_line():
    import input_pipeline

    from t5like.errors import ConfigError

    with pytest.raises(ConfigError, match=r"unrecognized arguments: --second=3; see input_pipeline.py --help"):
        input_pipeline.parse(["--second=3"])
