"""Coordinate check: do activations keep their size from narrow to wide models, at equal learning-rate rules?

    python benchmarks/widths.py [--config=configs/t5_small.py] [--widths=128,256,512,1024] [--steps=8]

A learning rate that was found at one width holds at another if each kind of activation stays of order 1 in the first
steps at all widths (Yang et al. 2022, arXiv:2203.03466, appendix D.1). The config's model is trained at each width,
with heads of 64 and an MLP twice as wide, one layer per stack, a small vocabulary and short rows, at the full learning
rate from the first step on, repeatedly on one batch of random tokens. `RULES` are the presets' optimizers with their
learning rates and initial values, and plain AdamW for comparison.

Prints a JSON line per rule, width and activation, with its RMS before the first and after the last step; and on
standard error a table of the latter, with the exponent of the width that fits best: 0, if the size does not depend on
the width.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import measurement

RULES = {  # optimizer.name, optimizer.learning_rate, model.init, model.attention_init
    "adafactor 0.01": ("adafactor", 0.01, "t5", "random"),  # t5_small and larger
    "muon 0.005": ("muon", 0.005, "gpt2", "local"),  # tiny
    "adamw_rms 0.03": ("adamw_rms", 0.03, "t5", "random"),
    "adamw 0.003": ("adamw", 0.003, "t5", "random"),
}


def fields(width: int, rule: str) -> list[tuple[str, str]]:
    """What changes in the config for a width and a rule."""
    name, rate, init, attention_init = RULES[rule]
    values = {
        "tokenizer.vocab_size": 512,
        "tokenizer.num_sentinels": 40,
        "data.batch_size": 8,
        "data.inputs_length": 64,
        "data.targets_length": 16,
        "model.num_layers": 1,
        "model.model_dim": width,
        "model.num_heads": width // 64,
        "model.head_dim": 64,
        "model.mlp_dim": 2 * width,
        "model.init": init,
        "model.attention_init": attention_init,
        "optimizer.name": name,
        "optimizer.learning_rate": rate,
        "optimizer.schedule": "constant",
        "optimizer.warmup_steps": 0,
        "mesh.data": -1,
        "mesh.fsdp": 1,
    }
    return [(field, str(value)) for field, value in values.items()]


def sizes(config_path: str, width: int, rule: str, steps: int) -> dict[str, list[float]]:
    """RMS of each kind of activation before the first and after the last step."""
    import jax
    import jax.numpy as jnp
    from train_step import Trainer

    from t5like.config import loader
    from t5like.model.transformer import Transformer
    from t5like.optim.layer_statistics import OF_ACTIVATION, activation_statistics

    trainer = Trainer(loader.load(config_path, fields(width, rule)))
    of_layers = jax.jit(partial(activation_statistics, trainer.config))
    of_logits = jax.jit(
        lambda params, batch: jnp.sqrt(jnp.mean(Transformer(trainer.config).apply({"params": params}, batch) ** 2))
    )

    def measure() -> dict[str, float]:
        params = trainer.state.params
        found = {
            name.replace("/layers/", " "): float(values[0, OF_ACTIVATION.index("rms")])
            for name, values in of_layers(params, trainer.batch).items()
        }
        return found | {"logits": float(of_logits(params, trainer.batch))}

    before = measure()
    trainer.run(steps)
    after = measure()
    return {name: [before[name], after[name]] for name in before}


def exponent(widths: list[int], values: list[float]) -> float:
    """The slope of log(value) against log(width)."""
    import numpy as np

    return float(np.polyfit(np.log(widths), np.log(values), 1)[0])


def rows(results: dict[tuple[str, int], dict[str, list[float]]], widths: list[int]) -> list[dict[str, object]]:
    """A row per rule and activation: its RMS after the last step at each width, and the exponent."""
    table = []
    for rule in dict.fromkeys(rule for rule, _ in results):
        for name in results[rule, widths[0]]:
            before, after = zip(*(results[rule, width][name] for width in widths), strict=True)
            table.append(
                {
                    "rule": rule,
                    "activation": name,
                    **{str(width): value for width, value in zip(widths, after, strict=True)},
                    "exponent": exponent(widths, after),
                    "exponent before": exponent(widths, before),
                }
            )
    return table


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(description="Compare activations of models of several widths.")
    parser.add_argument("--config", default=str(Path(__file__).resolve().parent.parent / "configs/t5_small.py"))
    parser.add_argument("--widths", default="128,256,512,1024", help="multiples of 64")
    parser.add_argument("--rules", default=",".join(RULES), help=f"of {', '.join(RULES)}")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args(arguments)
    options.widths, options.rules = [int(width) for width in options.widths.split(",")], options.rules.split(",")
    if unknown := set(options.rules) - set(RULES):
        parser.error(f"--rules: {', '.join(unknown)} must be of {', '.join(RULES)}")
    return options


def main(arguments: list[str]) -> None:
    """Measure the activations of all rules and widths."""
    options = parse(arguments)
    measurement.emit(**measurement.machine("jax", "jaxlib"))
    results = {}
    for rule in options.rules:
        for width in options.widths:
            results[rule, width] = sizes(options.config, width, rule, options.steps)
            for name, (before, after) in results[rule, width].items():
                measurement.emit(rule=rule, width=width, activation=name, before=before, after=after)
    print(measurement.table(rows(results, options.widths)), file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
