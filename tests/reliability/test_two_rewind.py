"""Two processes that go back to a checkpoint because of bad steps end in the same state as one process."""

import pytest
from runs import Trainer, checkpoints, metrics_of, smallest, start_processes, state_of, wait_for_end

from t5like.data.row_schedule import Segment

STEPS = 12
HOOK = ("--nan_rows", "48", "71")  # those of steps 7, 8 and 9, after the checkpoint of step 5


@pytest.mark.long
def test_two_processes_rewind_together_and_end_as_one_process_with_two_devices(flags, tmp_path):
    values = {"mesh__fsdp": 2, "train__num_steps": STEPS}
    two = start_processes(2, smallest(flags, tmp_path / "two", **values), tmp_path / "log", {0: HOOK, 1: HOOK})
    arguments = [*smallest(flags, tmp_path / "one", **values), "--fake_devices=2"]
    one = Trainer(arguments, tmp_path / "log-one", hooks=HOOK)
    assert wait_for_end([*two, one], 120) == [0, 0, 0], (two[0].err, one.err)
    for workdir, trainer in ((tmp_path / "two", two[0]), (tmp_path / "one", one)):
        assert trainer.err.count("the loss is not finite, update skipped") == 3
        assert "rewind     to step 5; the batches up to step 9 are passed over" in trainer.err
        history = checkpoints(workdir).meta(STEPS).history
        assert history.rewinds == 1 and history.rows.segments == (Segment(0, 0, 8), Segment(5, 72, 8))
        assert sorted(path.name for path in (workdir / "bad_steps").iterdir()) == ["7", "8", "9"]
    assert state_of(tmp_path / "two", STEPS) == state_of(tmp_path / "one", STEPS)
    assert metrics_of(tmp_path / "two") == metrics_of(tmp_path / "one")
    assert "t5like" not in two[1].err  # only process 0 reports
