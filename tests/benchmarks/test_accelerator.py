"""benchmarks/accelerator.py on the CPU, at toy sizes: its parts, what it imports, how it continues; the report."""

import json
import math
import os

import pytest
from documents import ROOT

# Installed in the measuring process, which then finds only the standard library, the five packages and what they need.
ONLY_ALLOWED = """
import sys
from importlib.machinery import PathFinder

ALLOWED = {"t5like", "jax", "jaxlib", "flax", "optax", "ml_collections", "numpy"}
ALLOWED |= {"ml_dtypes", "opt_einsum", "scipy", "absl", "yaml", "_yaml", "msgpack", "typing_extensions"}
ALLOWED |= {"rich", "pygments"}  # of flax
ALLOWED |= {"accelerator_jax", "accelerator_attention", "accelerator_plan", "accelerator_shapes"}
ALLOWED |= {"generate", "measurement", "peers", "train_step", "t5_small", "llama_7b", *sys.stdlib_module_names}


class OnlyAllowed:
    find_distributions = staticmethod(PathFinder.find_distributions)

    def __init__(self, finders):
        self.finders = finders

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED and not name.startswith("_"):
            return None
        return next(filter(None, (each.find_spec(name, path, target) for each in self.finders)), None)


sys.meta_path[:] = [OnlyAllowed([*sys.meta_path])]
"""


@pytest.fixture
def accelerator(monkeypatch):
    """The script, imported as it imports its own modules."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import accelerator

    return accelerator


def numbers(value: object) -> list[float]:
    """All numbers in a JSON value."""
    if isinstance(value, dict | list):
        return [each for item in (value.values() if isinstance(value, dict) else value) for each in numbers(item)]
    return [value] if isinstance(value, int | float) else []


def test_parts_run_without_other_packages_and_is_not_repeated(accelerator, tmp_path, monkeypatch, capfd):
    (tmp_path / "sitecustomize.py").write_text(ONLY_ALLOWED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("_device_count=8", "_device_count=1"))
    larger = {"t5_large", "t5_xl"}  # at toy sizes the programs of t5_base
    parts = [name for name in accelerator.LIMITS if name not in larger]
    command = [f"--out={tmp_path}/out", "--minutes=60", "--peers=", f"--only={','.join(parts)}"]
    assert accelerator.main(command) == 0, capfd.readouterr().err
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    results = {row["part"]: row["result"] for row in rows}
    assert list(results) == parts
    assert all(map(math.isfinite, numbers(rows))) and all(result["passed"] for result in results.values())
    kernels = {(case["dtype"], case["kernel"]) for case in results["attention_values"]["cases"]}
    assert kernels == {("float32", "cpu"), ("bfloat16", "cpu")}
    assert results["attention_values"]["cases"][0]["errors"].keys() == {"output", "query", "key", "value", "bias"}
    losses = results["loss_curve"]["float32"]["losses"]
    assert len(losses) == 20 and losses[-1] < losses[0] and losses != results["loss_curve"]["cpu"]
    trained = [results[name] for name in ("t5_base", "llama_1b", "bert_base")]
    assert min(min(each["tokens_per_second"], each["memory_gib"], each["compile_s"]) for each in trained) > 0
    assert [case["rows"] for case in results["decoding"]["cases"]] == [1, 2]

    with (tmp_path / "out/results.jsonl").open("a") as file:
        file.write('\n{"key": "cut of')
    code = accelerator.main([*command, "--only=matmul,t5_base", "--kernels=plain", "--minutes=0.1"])
    out, err = capfd.readouterr()
    assert (code, out) == (75, "") and "matmul: measured before" in err and "t5_base: measured before" not in err
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["not_measured"] == {"t5_base": "no time was left"} and list(report["results"]["t5like"]) == ["matmul"]


def test_batches_are_halved_until_they_fit_then_recomputed(accelerator):
    import accelerator_shapes as shapes

    tries, seen = shapes.attempts(16), []
    assert tries == [(16, "none"), (8, "none"), (4, "none"), (16, "full"), (8, "full"), (4, "full")]
    assert shapes.attempts(16, shapes.Attempt(4, "none"))[:2] == [(4, "none"), (16, "full")]

    def run(attempt: shapes.Attempt) -> int:
        seen.append(attempt)
        if attempt.remat == "none":
            raise MemoryError
        return attempt.rows

    assert shapes.first_that_fits(tries, run, lambda error: isinstance(error, MemoryError)) == 16
    assert seen == tries[:4]
    with pytest.raises(shapes.DoesNotFit, match="4 rows with remat=none do not fit"):
        shapes.first_that_fits(tries[:3], run, lambda error: True)
    with pytest.raises(MemoryError):
        shapes.first_that_fits(tries, run, lambda error: False)


def test_goals_are_judged_where_both_sides_were_measured(accelerator):
    import accelerator_report as reports

    attention = {"case": "encoder", "biased": True, "ours_ms": 2.0, "cudnn_ms": 1.5}
    ours = {"t5_base": {"mfu": 0.5, "tokens_per_second": 27.0}, "attention_speed": {"cases": [attention]}}
    torch = {"t5_base": {"tokens_per_second": 20.0}}
    goals = list(reports.goals({"t5like": ours, "torch": torch}, judged=True))
    met = {goal["goal"]: (goal["measured"], goal["met"]) for goal in goals if goal["measured"] is not None}
    assert met == {
        "t5_base: MFU of the bfloat16 peak": (0.5, False),
        "t5_base: tokens/s over those of compiled PyTorch": (1.35, True),
        "attention, encoder: rate over cuDNN's": (0.75, True),
    }
    assert {goal["met"] for goal in reports.goals({"t5like": ours, "torch": torch}, judged=False)} == {None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only=matmul,speed"], "--only=speed must name parts; use attention_values, loss_curve, matmul, "),
        (["--minutes=0"], "--minutes=0 must be above 0; use --minutes=8"),
        (["--shape=toy"], "unrecognized arguments: --shape=toy; see accelerator.py --help"),
    ],
)
def test_a_mistake_is_one_line(accelerator, capfd, arguments, message):
    with pytest.raises(SystemExit) as ended:
        accelerator.parse(arguments)
    err = capfd.readouterr().err
    assert ended.value.code == 2 and err.startswith(f"accelerator.py: {message}") and err.count("\n") == 1
