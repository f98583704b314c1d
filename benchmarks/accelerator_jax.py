"""The JAX process of `accelerator.py`: measures the parts that it is asked for, on the first device.

`main` prints a JSON line that describes the machine, then reads the name of a part from each line of its input, and
prints its result or its error. The memory of a step is that of its program, so it does not depend on earlier parts.
"""

import functools
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import accelerator_attention
import accelerator_plan
import jax
import jax.numpy as jnp
import measurement
import numpy as np
from accelerator_shapes import CONFIGS, SHAPES, Attempt, attempts, fields, first_that_fits, toy
from generate import t5like_decoder
from train_step import Trainer, random_batches

from t5like.config import loader
from t5like.config.schema import Config
from t5like.metrics import flops

GIB = 2**30
CURVE_STEPS = 20
CURVE_TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-2}  # of a loss, relative to the CPU's in float32
CURVE = {  # a T5 whose steps a CPU computes in a fraction of a second; heads and lengths are those of real models
    "tokenizer.vocab_size": 2048,
    "data.batch_size": 8,
    "data.inputs_length": 256,
    "data.targets_length": 114,
    "model.num_layers": 2,
    "model.model_dim": 256,
    "model.num_heads": 4,
    "model.mlp_dim": 512,
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 1e-3,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "mesh.data": 1,
    "mesh.fsdp": 1,
}
TOY_CURVE = {  # a decoder takes half as long to compile
    "model.architecture": "decoder",
    "data.objective": "causal_lm",
    "tokenizer.vocab_size": 384,
    "data.inputs_length": 32,
    "data.targets_length": 16,
    "model.num_layers": 1,
    "model.model_dim": 32,
    "model.num_heads": 2,
    "model.head_dim": 16,
    "model.mlp_dim": 64,
}
DECODING = {"prompt": 512, "new": 64, "rows": (1, 32), "times": 5}
TOY_DECODING = {"prompt": 16, "new": 4, "rows": (1, 2), "times": 1}


def machine() -> dict[str, Any]:
    """Device and versions: results of equal machines can be compared."""
    device = jax.devices()[0]
    return {
        **measurement.machine("jax", "jaxlib", "flax", "optax", "ml_collections", "numpy"),
        "platform": device.platform,
        "device": device.device_kind,
        "runtime": " ".join(device.client.platform_version.split())[:120],
        "memory_gib": memory_limit(device) and memory_limit(device) / GIB,
        "peak_tflops": (peak := bf16_peak()) and peak / 1e12,
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def memory_limit(device: jax.Device) -> int | None:
    """Bytes that JAX may use of a device's memory; None on a CPU."""
    return (device.memory_stats() or {}).get("bytes_limit")


def bf16_peak() -> float | None:
    """FLOP/s of the device in bfloat16 by its data sheet; None where it is not known, as on a CPU."""
    device = jax.devices()[0]
    return None if device.platform == "cpu" else flops.peak_flops([device])


# ---- Parts ----


def loss_curve(*, toy: bool) -> dict[str, Any]:
    """The losses of `CURVE_STEPS` steps on the device in both dtypes, and on the CPU of this machine in float32."""
    values = CURVE | (TOY_CURVE if toy else {})
    config = lambda **more: loader.load(
        CONFIGS / "t5_small.py", [(name, str(value)) for name, value in (values | more).items()]
    )
    reference_kernels = "plain" if jax.default_backend() == "cpu" else "auto"
    cpu = jax.devices("cpu")[:1]
    reference = curve(config(**{"model.dtype": "float32", "model.kernels": reference_kernels}), cpu)
    result: dict[str, Any] = {"cpu": reference}
    for dtype, tolerance in CURVE_TOLERANCES.items():
        if dtype == "float32":
            jax.config.update("jax_default_matmul_precision", "highest")  # a context would not reach all threads
        losses = curve(config(**{"model.dtype": dtype}), jax.devices()[:1])
        jax.config.update("jax_default_matmul_precision", None)
        difference = float(np.max(np.abs(np.subtract(losses, reference)) / np.abs(reference)))
        result[dtype] = {"losses": losses, "difference": difference, "passed": difference <= tolerance}
    return result | {"passed": all(result[dtype]["passed"] for dtype in CURVE_TOLERANCES)}


def curve(config: Config, devices: list[jax.Device]) -> list[float]:
    """The losses of the first steps."""
    trainer, losses = Trainer(config, devices), []
    batches = random_batches(trainer.config)
    for step in range(CURVE_STEPS):
        trainer.batch = batches.at(step)
        trainer.run(1)
        losses.append(float(trainer.metrics["loss"].mean()))
    return losses


def matmul(*, toy: bool) -> dict[str, Any]:
    """TFLOP/s of a large matmul of random numbers, by dtype and precision of float32."""
    size, result = 128 if toy else 8192, {}
    matrix = jax.random.normal(jax.random.key(0), (2, size, size), jnp.float32)
    for name, dtype, precision in (
        ("bfloat16", jnp.bfloat16, None),
        ("float32, default precision", jnp.float32, None),
        ("float32, highest precision", jnp.float32, "highest"),
    ):
        left, right = matrix.astype(dtype)
        product = jax.jit(lambda a, b, precision=precision: jnp.matmul(a, b, precision=precision))
        result[name] = 2e-9 * size**3 / accelerator_attention.milliseconds(product, left, right)
    return {"passed": True, "size": size, "tflops": result}


def train(name: str, kernels: str, *, toy: bool) -> dict[str, Any]:
    """Step time, memory and compile time of a model, with the largest batch of `attempts` that fits."""
    shape = small(SHAPES[name]) if toy else SHAPES[name]
    dtype = "float32" if toy else "bfloat16"
    config_of = lambda attempt: loader.load(CONFIGS / shape.config, fields(shape, attempt, dtype, kernels))
    tries = [each for each in attempts(shape.rows) if accelerator_plan.may_fit(config_of(each))]
    tries = tries or attempts(shape.rows)[-1:]
    tried = []

    def run(attempt: Attempt) -> dict[str, Any]:
        gc.collect()  # the arrays of an attempt that did not fit
        tried.append(attempt)
        return train_steps(config_of(attempt), seconds=0.0 if toy else 5.0)

    result = first_that_fits(tries, run, is_out_of_memory)
    return {"rows": tried[-1].rows, "remat": tried[-1].remat, "attempts": len(tried), "dtype": dtype} | result


@functools.cache  # the toy sizes of the three T5 are one model
def train_steps(config: Config, seconds: float) -> dict[str, Any]:
    """Compile and run the step of a config; median over so many seconds of steps, 3 to 30."""
    begin = time.perf_counter()
    trainer = Trainer(config, jax.devices()[:1])
    [first] = trainer.run(1)
    ready = time.perf_counter() - begin
    trainer.run(2)
    again = min(trainer.run(2))
    steps = trainer.run(max(3, min(30, int(seconds / again))))
    metrics = {key: float(value.mean()) for key, value in trainer.metrics.items()}
    speed = measurement.summary([1e3 * each for each in steps], accelerator_plan.tokens_per_step(config))
    rate = trainer.flops / speed["step_ms"] * 1e3
    peak = bf16_peak()
    return {
        "passed": bool(np.isfinite(metrics["loss"])) and metrics["skipped_updates"] == 0,
        "loss": metrics["loss"],
        "params": trainer.start["params"],
        "flops_per_step": trainer.flops,
        **speed,
        "steps": len(steps),
        "tflops": rate / 1e12,
        "mfu": peak and rate / peak,
        **memory(trainer.compiled),
        "lower_s": trainer.start["lower_s"],
        "compile_s": trainer.start["compile_s"],
        "first_step_s": first,
        "ready_s": ready,
        "kernels": trainer.config.model.kernels,
        **accelerator_plan.predictions(trainer.config, trainer.compiled, jax.devices()[0]),
    }


def memory(compiled: jax.stages.Compiled) -> dict[str, float]:
    """GiB that a step reserves, by the compiler, and the highest use so far of the process, which grows only."""
    parts = compiled.memory_analysis()
    arguments = parts.argument_size_in_bytes
    total = arguments + parts.output_size_in_bytes - parts.alias_size_in_bytes + parts.temp_size_in_bytes
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "memory_gib": total / GIB,
        "state_gib": arguments / GIB,
        "process_peak_gib": stats.get("peak_bytes_in_use", 0) / GIB or None,
    }


def is_out_of_memory(error: Exception) -> bool:
    """Whether XLA could not allocate memory, when it compiled or when it ran."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def decoding(*, toy: bool) -> dict[str, Any]:
    """Tokens per second of T5 base, greedy."""
    settings = TOY_DECODING if toy else DECODING
    shape = small(SHAPES["t5_base"]) if toy else SHAPES["t5_base"]
    config = loader.load(CONFIGS / shape.config, fields(shape, Attempt(1, "none"), "float32" if toy else "bfloat16"))
    cases = []
    for rows in settings["rows"]:
        run, params = t5like_decoder(config, rows, settings["prompt"], settings["new"], 1)
        [first] = run(1)
        best = float(np.median(run(settings["times"])))
        new = settings["new"]
        cases.append(
            {"rows": rows, "prompt": settings["prompt"], "new": new, "params": params, "first_s": first}
            | {"tokens_per_second": rows * new / best, "token_ms": 1e3 * best / new}
        )
    return {"passed": True, "cases": cases}


small = toy  # `toy` is also the name of an argument
PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "attention_values": accelerator_attention.compare_values,
    "loss_curve": loss_curve,
    "matmul": matmul,
    "attention_speed": accelerator_attention.time_kernels,
    "decoding": decoding,
}


def main(*, toy: bool) -> None:
    """Measure the parts that standard input names, one in a line."""
    print(json.dumps({"machine": machine()}), flush=True)
    for line in sys.stdin:
        name, *kernels = line.split()
        try:
            result = PARTS[name](toy=toy) if name in PARTS else train(name, *kernels, toy=toy)
            print(json.dumps({"result": result}), flush=True)
        except Exception as error:
            traceback.print_exc()
            print(json.dumps({"error": accelerator_attention.message(error)}), flush=True)


if __name__ == "__main__":
    main(toy="--toy" in sys.argv)
