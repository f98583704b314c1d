"""What happened in a run is read from its directory and shown."""

import json
import shutil

from t5like.checkpoint import provenance
from t5like.inspect import run


def test_a_run_is_described_by_config_starts_changes_checkpoints_bad_steps_and_losses(command, trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    code, out, _ = command("inspect", "run", f"--workdir={workdir}")
    lines = run.describe(workdir)
    assert code == 0 and out.splitlines() == lines
    assert lines[0] == f"run        {workdir}" and "config     data.batch_size=8" in lines
    assert not any("config     train.z_loss" in line for line in lines)  # at its default
    assert "saved      steps 1, 2; 0 rewinds" in lines
    assert sum(line.startswith("start      ") and line.endswith("t5like 0.1.0") for line in lines) == 1
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    [last] = [record["eval/loss"] for record in records if record["step"] == 2 and "eval/loss" in record]
    assert lines[-1] == f"loss       {last:.4f} at step 2, held out"

    change = "optimizer.learning_rate: 0.01 -> 0.005"
    provenance.append(workdir, 2, {"versions": {"t5like": "0.1.0"}, "changes": [change]})
    (workdir / "bad_steps" / "3").mkdir(parents=True)
    (workdir / "bad_steps" / "3" / "step.json").write_text(json.dumps({"reason": "the loss is not finite"}))
    (workdir / "metrics.jsonl").open("a").write('{"step": 3, "train/loss": null}\n')
    lines = run.describe(workdir)
    assert f"change     {change}" in lines and "bad step   3: the loss is not finite" in lines
    assert "loss       not finite at step 3, training" in lines
