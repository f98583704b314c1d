"""Time and FLOPs of a train step by window pattern, next to full attention.

    python benchmarks/windows.py [--architecture=decoder] [--length=2048] [--window=256] [--rows=1] [--rounds=3]
    python benchmarks/windows.py --skip=no    # local layers compute all scores and mask them, for comparison

A small model with 6 layers and rotary positions is trained on random tokens, with all layers local, with 5 local layers
for each global one (Gemma 3), with every third layer global (ModernBERT), with every second one (Gemma 2), and with
full attention. The window is that of `model.attention_window`: of an encoder it reaches to both sides. The patterns
take turns for a step each, so that the load of the machine meets all of them.

Prints JSON lines with the machine and each pattern's figures, and on standard error a table: FLOPs of the step as
`metrics.flops` counts them and as XLA counts those of the compiled program, and the median time of a step.
"""

import argparse
import statistics
import sys
from pathlib import Path

import measurement

ROOT = Path(__file__).resolve().parent.parent
PATTERNS = {
    "full": (),
    "1 local : 1 global": ("local", "global"),
    "2 local : 1 global": ("global", "local", "local"),
    "5 local : 1 global": ("local",) * 5 + ("global",),
    "all local": ("local",),
}


def fields(options: argparse.Namespace, pattern: tuple[str, ...]) -> list[tuple[str, str]]:
    """What changes in the config `tiny` for a pattern."""
    lengths = {"decoder": ("causal_lm", 0, options.length), "encoder": ("mlm", options.length, 0)}
    objective, inputs, targets = lengths[options.architecture]
    values = {
        "model.architecture": options.architecture,
        "data.objective": objective,
        "data.inputs_length": inputs or 32,
        "data.targets_length": targets or 32,
        "data.batch_size": options.rows,
        "model.num_layers": options.layers,
        "model.model_dim": options.dim,
        "model.num_heads": max(options.dim // 64, 1),
        "model.head_dim": min(64, options.dim),
        "model.mlp_dim": 2 * options.dim,
        "model.positions": "rotary",
        "model.attention_window": options.window if pattern else 0,
        "model.layer_pattern": ",".join(pattern),
    }
    return [(name, str(value)) for name, value in values.items()]


def measure(options: argparse.Namespace) -> list[dict[str, object]]:
    """A row of figures for each pattern."""
    from train_step import Trainer

    from t5like.config import loader
    from t5like.model.kernels import local_attention
    from t5like.sharding import allocator

    allocator.keep_freed()  # as in `t5like train`

    if options.skip == "no":
        local_attention.LARGEST_SHARE = 0.0
    trainers = {
        name: Trainer(loader.load(str(ROOT / "configs/tiny.py"), fields(options, pattern)))
        for name, pattern in PATTERNS.items()
    }
    for trainer in trainers.values():
        trainer.run(1)
    times = {name: [] for name in trainers}
    for _ in range(options.rounds):
        for name, trainer in trainers.items():
            times[name] += trainer.run(1)
    full = statistics.median(times["full"])
    return [
        {
            "pattern": name,
            "model GFLOP": trainer.flops / 1e9,
            "XLA's GFLOP": trainer.compiled.cost_analysis()["flops"] / 1e9,
            "step ms": 1e3 * statistics.median(times[name]),
            "of full": statistics.median(times[name]) / full,
        }
        for name, trainer in trainers.items()
    ]


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(description="Time steps by window pattern.")
    parser.add_argument("--architecture", choices=("decoder", "encoder"), default="decoder")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--window", type=int, default=256, help="model.attention_window")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--dim", type=int, default=256, help="model_dim, in heads of 64")
    parser.add_argument("--layers", type=int, default=6, help="a multiple of the length of all patterns")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each pattern")
    parser.add_argument("--skip", choices=("yes", "no"), default="yes", help="whether windows skip keys")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Measure all patterns."""
    options = parse(arguments)
    measurement.emit(**measurement.machine("jax", "jaxlib"), **vars(options))
    rows = measure(options)
    for row in rows:
        measurement.emit(**row)
    print(measurement.table(rows), file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
