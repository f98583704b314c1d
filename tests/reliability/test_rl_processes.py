"""`t5like rl` in 1, 2 and 4 processes, and after a kill: the same prompts, answers and rewards, the same parameters."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from runs import Trainer, checkpoints, restored, run_to_end, settings, start_processes, state_of, wait_for_end

from t5like.checkpoint.step_directories import COMMITTED
from t5like.metrics.time_spent import PREFIX
from t5like.metrics.writers import read

LAST = 6  # steps; three rollouts
# PPO with further rollouts: prompts without spread are replaced; there are a reference, old values and two updates.
VALUES = {
    "rl__advantage": "gae",
    "rl__reference": "first",
    "rl__kl_coefficient": 0.1,
    "rl__updates_per_rollout": 2,
    "rl__redraws": 1,
    "train__num_steps": LAST,
    "train__eval_every": LAST,
    "train__process_timeout_seconds": 60,
    "optimizer__learning_rate": 0.001,
}


@pytest.fixture(scope="module")
def rl_flags(rl_flags, trained) -> list[str]:
    """With an encoder-decoder; the rows into which a decoder's prompts and answers are packed depend on the mesh."""
    values = {
        "init_from__checkpoint": trained,
        "model__architecture": "encoder_decoder",
        "model__positions": "relative",
        "model__mlp": "gated_gelu",
        "model__scale_attention": False,
    }
    return [*rl_flags, *settings(**values)]


def arguments(rl_flags: list[str], workdir: Path, **values) -> list[str]:
    return ["rl", *rl_flags, *settings(**VALUES | values), f"--workdir={workdir}"]


@pytest.fixture(scope="module")
def alone(rl_flags, tmp_path_factory) -> Path:
    """A run of one process that nothing interrupts."""
    place = tmp_path_factory.mktemp("alone")
    run_to_end(arguments(rl_flags, place / "run"), place / "log")
    return place / "run"


def answers_of(workdir: Path) -> dict[str, list[dict]]:
    """All sampled answers of each rollout, with prompts and rewards."""
    paths = sorted((workdir / "answers").iterdir())
    return {path.name: [json.loads(line) for line in path.read_text("utf-8").splitlines()] for path in paths}


def metrics_of(workdir: Path) -> list[dict]:
    """The metrics without times."""
    is_time = lambda name: name.endswith(("seconds", "per_second")) or name.startswith(PREFIX)
    rows = [{name: value for name, value in record.items() if not is_time(name)} for record in read(workdir)]
    return [row for row in rows if row.keys() > {"step"}]


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_sample_the_same_answers_and_learn_the_same_parameters_as_one(
    count, alone, rl_flags, tmp_path
):
    axes = {"mesh__fsdp": 2} if count == 2 else {"mesh__data": 2, "mesh__fsdp": 2}
    several = start_processes(count, arguments(rl_flags, tmp_path / "run", **axes), tmp_path / "log")
    assert wait_for_end(several, 240) == [0] * count, [each.err for each in several]
    actual, expected = answers_of(tmp_path / "run"), answers_of(alone)
    assert list(expected) == ["0.jsonl", "2.jsonl", "4.jsonl"] and len(expected["0.jsonl"]) == 8 * 3
    assert actual == expected
    for ours, wanted in zip(metrics_of(tmp_path / "run"), metrics_of(alone), strict=True):
        assert ours == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    arrays, begun = restored(tmp_path / "run"), restored(alone)
    for name, array in restored(alone).items():
        np.testing.assert_allclose(arrays[name], array, rtol=1e-3, atol=1e-5, err_msg=name)
    assert begun.keys() == arrays.keys() and len(arrays) > 20


@pytest.mark.long
def test_a_run_killed_in_the_middle_of_a_rollout_continues_bitwise(alone, rl_flags, tmp_path):
    workdir = tmp_path / "run"
    saved = workdir / "checkpoints/4" / COMMITTED
    # After the first of the two updates of a rollout.
    hook = ("--step=5", f"--signal={int(signal.SIGKILL)}", f"--after={saved}")
    with Trainer(arguments(rl_flags, workdir), tmp_path / "killed", hooks=hook) as trainer:
        assert trainer.end() == -signal.SIGKILL, trainer.err
    assert checkpoints(workdir).latest() == 4
    (workdir / "answers/4.jsonl").unlink()  # the run that continues samples them again
    run_to_end(arguments(rl_flags, workdir), tmp_path / "continued")
    assert state_of(workdir, LAST) == state_of(alone, LAST) and len(state_of(alone, LAST)) > 20
    assert answers_of(workdir) == answers_of(alone)
    assert metrics_of(workdir) == metrics_of(alone)
