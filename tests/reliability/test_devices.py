"""A run on 1, then 3, then 2 devices has the batches of a run on one device, and its losses to rounding."""

import numpy as np
import pytest
from instrumented_run import read_records
from runs import SPEED, checkpoints, run_to_end, smallest

from t5like.metrics.writers import read

CHAIN = ((1, 4), (3, 8), (2, 12))  # devices, last step
SMALL = {"data__batch_size": 12, "train__checkpoint_every": 4, "train__eval_every": 1000, "model__dropout_rate": 0}


def batches(path) -> list[dict[str, np.ndarray]]:
    """The batches of a run: the rows of all devices, in order."""
    complete = []
    for _, parts in read_records(path):
        rows: dict[str, list] = {}
        for name, _, data in sorted(parts, key=lambda part: part[1][0].start or 0):
            rows.setdefault(name, []).append(data)
        complete.append({name: np.concatenate(each) for name, each in rows.items()})
    return complete


@pytest.mark.long
def test_a_run_on_one_three_and_two_devices_has_the_batches_and_losses_of_one(flags, tmp_path):
    chain, alone = tmp_path / "chain", tmp_path / "alone"
    for number, (devices, last) in enumerate(CHAIN):
        arguments = [*smallest(flags, chain, **SMALL, train__num_steps=last), f"--fake_devices={devices}"]
        hooks = (f"--records={tmp_path}/records-{number}",)
        run_to_end(arguments, tmp_path / f"log-{number}", hooks=hooks)
        assert checkpoints(chain).latest() == last
    run_to_end(
        [*smallest(flags, alone, **SMALL, train__num_steps=12), "--fake_devices=1"],
        tmp_path / "log-alone",
        hooks=(f"--records={tmp_path}/records-alone",),
    )
    expected = batches(tmp_path / "records-alone")
    evaluated = (len(expected) - 12) // 2  # batches of held-out rows, at the beginning and at the end
    trained = expected[evaluated : evaluated + 12]
    actual = []
    for number in range(3):
        first = evaluated if number == 0 else 0
        actual += batches(tmp_path / f"records-{number}")[first : first + 4]
    assert len(trained) == len(actual) == 12
    for want, have in zip(trained, actual, strict=True):
        assert want.keys() == have.keys()
        for name in want:
            np.testing.assert_array_equal(have[name], want[name])
    values = [
        {
            (record["step"], name): value
            for record in read(workdir)
            for name, value in record.items()
            if name.startswith("train/") and name not in SPEED
        }
        for workdir in (chain, alone)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-4) and len(values[0]) >= 24
