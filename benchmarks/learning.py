"""Learning per minute: held-out loss of one T5 1.1 under three recipes, with the same rows and processor time.

    python benchmarks/learning.py [--config=configs/tiny.py] [--minutes=2] [--seeds=0,1,2] [--torch_python=PYTHON]
                                  [--recipes=t5like,nanot5,huggingface] [--picture=learning.png]

* `t5like`: the config's initial values, optimizer and schedule, compiled by XLA.
* `nanot5`: transformers' T5 in PyTorch with AdamW scaled by RMS and the schedule of nanoT5 (`learning_peer.py`).
* `huggingface`: the same model with Adafactor and the schedule of `run_t5_mlm_flax.py`.

For each seed all recipes read the same rows in the same order in batches of the same size. The other two start from the
same weights, T5's random initial values, which t5like draws. The rows are made beforehand. No recipe has dropout. Each
schedule, with its warm-up, is scaled to the number of steps that fit into `--minutes` of processor time. This number is
measured in the first run of a recipe, and holds for all its seeds. The clock is the processor time of the process, all
threads together, so that other programs on the machine change it little; two minutes of it are one minute of two cores.
Start, compilation (torch.compile) and evaluation don't count. The held-out loss is that of all held-out rows, in nats
per target token.

Prints a JSON line per evaluation, draws the losses against time and tokens, and prints a table in Markdown on standard
error. A process runs one recipe, so that each imports only JAX or only torch.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import measurement

if TYPE_CHECKING:
    from train_step import Trainer

    from t5like.config.schema import Config
    from t5like.types import Tree

HERE = Path(__file__).resolve().parent
RECIPES = ("t5like", "nanot5", "huggingface")
COLORS = {"t5like": "tab:blue", "nanot5": "tab:orange", "huggingface": "tab:green"}
EVALUATIONS = 6  # of a run, after the one of the initial weights
SPARE = 3  # rows are made for this many times the steps of t5like, in case that another recipe has faster steps


def evaluated_steps(steps: int) -> list[int]:
    """The steps after which a run is evaluated."""
    return sorted({round(steps * part / EVALUATIONS) for part in range(EVALUATIONS + 1)})


def steps_within(minutes: float, seconds_per_step: float) -> int:
    """Number of steps in the processor time of a run."""
    return max(1, round(60 * minutes / seconds_per_step))


def with_steps(config: "Config", steps: int) -> "Config":
    """The config with its schedule scaled to a number of steps, evaluated on all held-out rows."""
    scale = steps / config.train.num_steps
    optimizer = dataclasses.replace(
        config.optimizer,
        warmup_steps=round(scale * config.optimizer.warmup_steps),
        decay_steps=round(scale * config.optimizer.decay_steps),
    )
    train = dataclasses.replace(config.train, num_steps=steps, eval_batches=2**31)
    return dataclasses.replace(config, optimizer=optimizer, train=train)


def train_ours(options: argparse.Namespace, config: "Config") -> None:
    """t5like's recipe, and the files for the others: rows, held-out rows, initial weights."""
    from train_step import Trainer

    from t5like.cli.main import start_devices
    from t5like.data import pipeline
    from t5like.data.pipeline import Batches
    from t5like.data.store import preparation
    from t5like.data.tokenizers.vocabulary import Vocabulary
    from t5like.evaluation.heldout import Evaluator
    from t5like.sharding import allocator

    start_devices(None)
    allocator.keep_freed()
    config = dataclasses.replace(config, seed=options.seed)
    steps = options.steps
    if not steps:
        trainer = Trainer(with_steps(config, 1000))
        trainer.run(3)
        steps = steps_within(options.minutes, measurement.time_steps(trainer.run, 10)["cpu_ms"] / 1e3)
    trainer = Trainer(with_steps(config, steps))
    config = trainer.config
    prepared = preparation.prepare(config)
    train, heldout = (
        Batches(config, Vocabulary.of(prepared.tokenizer), streams, heldout=split == "heldout")
        for split in ("train", "heldout")
        for streams in [pipeline.open_split(config, prepared.stores, split)]
    )
    rows = [train.at(step) for step in range(SPARE * steps)]
    save_rows(options.files / "train.npz", rows)
    save_rows(options.files / "heldout.npz", [heldout.at(index) for index in range(heldout.num_batches)])
    save_weights(options.files, config, t5_weights(trainer))
    evaluator = Evaluator(config, trainer.mesh, heldout, prepared.tokenizer)
    spent = 0.0
    for before, after in intervals(steps):
        begin = time.process_time()
        for step in range(before, after):
            trainer.batch = rows[step]
            trainer.run(1)
        spent += time.process_time() - begin
        report(options, after, spent, evaluator(trainer.state.params)["eval/loss"])


def t5_weights(trainer: "Trainer") -> "Tree":
    """Initial parameters of the trainer's model as T5 and transformers draw them."""
    from t5like.data import pipeline
    from t5like.optim import train_state

    model = dataclasses.replace(trainer.config.model, init="t5", attention_init="random")
    config = dataclasses.replace(trainer.config, model=model)
    rows = pipeline.spec(config)
    return train_state.new_state(config, rows, train_state.abstract_state(config, rows, trainer.mesh)).params


def intervals(steps: int) -> Iterator[tuple[int, int]]:
    """The steps between evaluations; the first interval is empty."""
    points = evaluated_steps(steps)
    return zip([0, *points[:-1]], points, strict=True)


def report(options: argparse.Namespace, step: int, spent: float, loss: float) -> None:
    """Print the JSON line of an evaluation."""
    measurement.emit(recipe=options.recipe, seed=options.seed, step=step, cpu_s=spent, loss=loss)


def save_rows(path: Path, batches: list) -> None:
    """Write batches as arrays [rows, length]; the fields that a span corruption without segments has."""
    import numpy as np

    fields = {"inputs": "encoder_BS", "decoder": "decoder_BL", "targets": "targets_BL", "weights": "weights_BL"}
    np.savez(path, **{name: np.concatenate([getattr(b, field) for b in batches]) for name, field in fields.items()})


def save_weights(directory: Path, config: "Config", params: object) -> None:
    """Write the parameters under the names of transformers, and the model's shape."""
    import numpy as np

    from t5like import tree
    from t5like.interop.huggingface import weight_maps

    named, tensors = tree.flatten(params), {}
    for entry in weight_maps.weight_map("t5", config.model):
        parts = [np.asarray(named[name]) for name in entry.params]
        for name, y in entry.names():
            tensor = weight_maps.to_huggingface(entry, [part if y is None else part[y] for part in parts])
            tensors[name] = tensor[: config.tokenizer.vocab_size] if entry.vocabulary else tensor
    np.savez(directory / "weights.npz", **tensors)
    shape = dataclasses.asdict(config.model) | {
        "vocab_size": config.tokenizer.vocab_size,
        "rows": config.data.batch_size,
    }
    (directory / "model.json").write_text(json.dumps(shape), encoding="utf-8")


def run(recipe: str, seed: int, steps: int, options: argparse.Namespace) -> list[dict]:
    """One run in its own process; its evaluations, with the tokens read so far."""
    program = [sys.executable, str(HERE / "learning.py"), f"--config={options.config}", *options.rest]
    if recipe != "t5like":
        program = [options.torch_python, str(HERE / "learning_peer.py"), *(["--eager"] if options.eager else [])]
    flags = [f"--recipe={recipe}", f"--seed={seed}", f"--steps={steps}", f"--minutes={options.minutes}"]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}  # waiting threads use no processor time
    command = [*program, *flags, f"--files={options.files}"]
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, encoding="utf-8", check=False)
    if process.returncode:
        raise SystemExit(f"learning.py: {recipe} ended with exit code {process.returncode}; its messages are above")
    points = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    shape = json.loads((options.files / "model.json").read_text(encoding="utf-8"))
    import numpy as np

    with np.load(options.files / "heldout.npz") as rows:
        row = rows["inputs"].shape[1] + rows["targets"].shape[1]
    return [point | {"tokens": point["step"] * shape["rows"] * row} for point in points]


def draw(points: list[dict], path: Path) -> None:
    """Draw held-out loss against processor time and against tokens; a line per run."""
    from matplotlib.figure import Figure  # not pyplot, which may look for a display

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    runs = defaultdict(list)
    for point in points:
        runs[point["recipe"], point["seed"]].append(point)
    labels = {"cpu_s": "processor time, s", "tokens": "tokens read, encoder and decoder"}
    for axes, (field, label) in zip(figure.subplots(1, 2, sharey=True), labels.items(), strict=True):
        shown = set()
        for (recipe, _), run_points in runs.items():
            name = recipe if recipe not in shown else None
            shown.add(recipe)
            axes.plot(
                [point[field] for point in run_points],
                [point["loss"] for point in run_points],
                color=COLORS[recipe],
                label=name,
                linewidth=1,
            )
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="held-out loss, nats per target token")
    figure.axes[0].legend()
    figure.savefig(path, dpi=80)


def table(points: list[dict]) -> str:
    """Each recipe's last evaluations over its seeds, in Markdown."""
    rows = []
    for recipe in dict.fromkeys(point["recipe"] for point in points):
        mine = [point for point in points if point["recipe"] == recipe]
        last = [point for point in mine if point["step"] == max(each["step"] for each in mine)]
        losses = [point["loss"] for point in last]
        rows.append(
            {
                "recipe": recipe,
                "steps": last[0]["step"],
                "tokens": last[0]["tokens"],
                "CPU ms per step": 1e3 * sum(point["cpu_s"] / point["step"] for point in last) / len(last),
                "CPU s": sum(point["cpu_s"] for point in last) / len(last),
                "held-out loss": sum(losses) / len(losses),
                "least": min(losses),
                "largest": max(losses),
            }
        )
    return measurement.table(rows)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line; `rest` has changed fields of the config."""
    parser = argparse.ArgumentParser(description="Compare what recipes learn in the same processor time.")
    parser.add_argument("--config", default=str(HERE.parent / "configs/tiny.py"))
    parser.add_argument("--minutes", type=float, default=2.0, help="processor time of a run, without its start")
    parser.add_argument("--seeds", default="0,1,2", help="of weights, rows and masks")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="t5like is always one of them")
    parser.add_argument("--torch_python", default=sys.executable, help="an interpreter that has torch and transformers")
    parser.add_argument("--eager", action="store_true", help="PyTorch without torch.compile")
    parser.add_argument("--picture", type=Path, default=Path("learning.png"), help="where to draw the losses")
    parser.add_argument("--recipe", choices=["t5like"], help="make one run in this process")
    for name in ("seed", "steps"):
        parser.add_argument(f"--{name}", type=int, default=0, help="of that run; 0 steps: measure how many fit")
    parser.add_argument("--files", type=Path, help="directory of rows and weights, for that run")
    options, options.rest = parser.parse_known_args(arguments)
    options.recipes = [name for name in options.recipes.split(",") if name]
    if options.recipes[:1] != ["t5like"] or set(options.recipes) - set(RECIPES):
        parser.error(f"--recipes={','.join(options.recipes)} must begin with t5like, and be of {', '.join(RECIPES)}")
    return options


def main(arguments: list[str]) -> None:
    """Run all recipes for all seeds, or one in this process."""
    options = parse(arguments)
    if options.recipe:
        from t5like.config import loader

        rest, overrides = measurement.split(options.rest)
        if rest:
            raise SystemExit(f"learning.py: unknown arguments {' '.join(rest)}; see learning.py --help")
        train_ours(options, loader.load(options.config, overrides))
        return
    points, steps = [], dict.fromkeys(options.recipes, options.steps)
    with tempfile.TemporaryDirectory() as directory:
        options.files = Path(directory)
        for seed in map(int, options.seeds.split(",")):
            for recipe in options.recipes:  # t5like first: it writes the files of the seed
                new = run(recipe, seed, steps[recipe], options)
                steps[recipe] = new[-1]["step"]
                points += new
                for point in new:
                    measurement.emit(**point)
            draw(points, options.picture)
    print(table(points), file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
