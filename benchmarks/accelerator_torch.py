"""The PyTorch process of `accelerator.py`: training steps, decoding and matmuls of compiled `transformers`.

Needs torch and transformers and nothing of t5like's dependencies. The protocol is that of `accelerator_jax`; a line of
the input may have the batch after the name of the part, with which t5like was measured: `t5_base 64 none`. Models as in
`torch_peer`: random weights in float32, autocast for bfloat16, fused AdamW, attention by
`scaled_dot_product_attention`. `torch.compile` gets the whole model, or each layer of a deep model (`WHOLE_LAYERS`).
"""

import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import measurement
import torch
from accelerator_shapes import SHAPES, Attempt, Shape, attempts, first_that_fits
from accelerator_shapes import toy as small
from generate import torch_decoder
from torch_peer import bert, llama, t5
from transformers import BertForMaskedLM

GIB = 2**30
WHOLE_LAYERS = 24  # a model of more layers takes minutes to compile as a whole
DECODING = {"prompt": 512, "new": 64, "rows": (1, 32), "times": 5}
TOY_DECODING = {"prompt": 16, "new": 4, "rows": (1, 2), "times": 1}
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def machine() -> dict[str, Any]:
    """Device, versions and settings."""
    return {
        **measurement.machine("torch", "transformers"),
        "platform": "gpu" if CUDA else "cpu",
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "runtime": f"cuda {torch.version.cuda}, cudnn {torch.backends.cudnn.version()}" if CUDA else "cpu",
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


def build(shape: Shape) -> torch.nn.Module:
    """The model of a shape with random weights, on the device."""
    torch.manual_seed(0)
    make = partial(bert, model=BertForMaskedLM) if not shape.targets else t5 if shape.inputs else llama
    with torch.device(DEVICE):
        return make(shape).train()


def compile_model(model: torch.nn.Module) -> tuple[Callable[..., Any], str]:
    """The function to call, and what was compiled: the whole model, or each layer."""
    stacks = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList)]
    names = ("T5Block", "LlamaDecoderLayer", "BertLayer")
    layers = [layer for stack in stacks for layer in stack if type(layer).__name__ in names]
    if len(layers) <= WHOLE_LAYERS:
        return torch.compile(model), "the model"
    torch._dynamo.config.recompile_limit = 64
    for layer in layers:
        layer.compile()
    return model, "each layer"


def train(name: str, first: Attempt | None, *, toy: bool) -> dict[str, Any]:
    """Step time, memory and compile time of a model, with the first batch that fits."""
    shape = small(SHAPES[name]) if toy else SHAPES[name]
    tried = []

    def run(attempt: Attempt) -> dict[str, Any]:
        tried.append(attempt)
        try:
            return train_steps(shape, attempt, bfloat16=not toy, seconds=0.0 if toy else 5.0)
        finally:
            torch._dynamo.reset()
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()

    result = first_that_fits(attempts(shape.rows, first), run, is_out_of_memory)
    return {"rows": tried[-1].rows, "remat": tried[-1].remat, "attempts": len(tried)} | result


def train_steps(shape: Shape, attempt: Attempt, *, bfloat16: bool, seconds: float) -> dict[str, Any]:
    """Compile and run steps of forward pass, backward pass and AdamW; median over so many seconds of steps, 3 to 30."""
    begin = time.perf_counter()
    model = build(shape)
    if attempt.remat == "full":
        model.gradient_checkpointing_enable()
    forward, compiled = compile_model(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    draw = lambda length: torch.randint(3, shape.vocabulary, (attempt.rows, length), device=DEVICE)
    labels = draw(shape.targets or shape.inputs)
    batch = {"input_ids": draw(shape.inputs) if shape.inputs else labels, "labels": labels}

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=bfloat16):
            loss = forward(**batch).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    timed(step, 1)
    ready = time.perf_counter() - begin
    timed(step, 2)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    again = timed(step, 2)
    count = max(1, min(6, int(seconds / 5 / again)))  # a round's steps, without waiting for the device in between
    rounds = [1e3 * timed(step, count) for _ in range(5)]
    loss = float(step())
    return {
        "passed": loss == loss,
        "loss": loss,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        **measurement.summary(rounds, attempt.rows * shape.row_tokens),
        "steps": 5 * count,
        "memory_gib": torch.cuda.max_memory_allocated() / GIB if CUDA else None,
        "ready_s": ready,
        "compiled": compiled,
        "attention": model.config._attn_implementation,
    }


def timed(function: Callable[[], Any], count: int) -> float:
    """Seconds of a call, of `count` calls."""
    wait()
    begin = time.perf_counter()
    for _ in range(count):
        function()
    wait()
    return (time.perf_counter() - begin) / count


def wait() -> None:
    """Wait until the device has done its work."""
    if CUDA:
        torch.cuda.synchronize()


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device's memory is exhausted; inside of compiled code the type may be another."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def matmul(*, toy: bool) -> dict[str, Any]:
    """TFLOP/s of a large matmul of random numbers; float32 with TF32 and without."""
    size, result = 128 if toy else 8192, {}
    left, right = torch.randn(2, size, size, device=DEVICE)
    for name, dtype, precision in (
        ("bfloat16", torch.bfloat16, "high"),
        ("float32, high precision", torch.float32, "high"),
        ("float32, highest precision", torch.float32, "highest"),
    ):
        torch.set_float32_matmul_precision(precision)
        a, b = left.to(dtype), right.to(dtype)
        timed(lambda a=a, b=b: a @ b, 3)
        result[name] = 2e-12 * size**3 / statistics.median(timed(lambda a=a, b=b: a @ b, 5) for _ in range(5))
    torch.set_float32_matmul_precision("high")
    return {"passed": True, "size": size, "tflops": result}


def decoding(*, toy: bool) -> dict[str, Any]:
    """Tokens per second of T5 base by `generate`, greedy, in bfloat16; not compiled, which is the library's default."""
    settings = TOY_DECODING if toy else DECODING
    shape = small(SHAPES["t5_base"]) if toy else SHAPES["t5_base"]
    model = build(shape).eval()
    if not toy:
        model = model.to(torch.bfloat16)
    cases, new = [], settings["new"]
    for rows in settings["rows"]:
        run = torch_decoder(model, rows, settings["prompt"], new, 1)
        [first] = run(1)
        seconds = statistics.median(run(settings["times"]))
        cases.append(
            {"rows": rows, "prompt": settings["prompt"], "new": new, "first_s": first}
            | {"tokens_per_second": rows * new / seconds, "token_ms": 1e3 * seconds / new}
        )
    return {"passed": True, "cases": cases}


def main(*, toy: bool) -> None:
    """Measure the parts that standard input names, one in a line."""
    torch.set_float32_matmul_precision("high")  # TF32, as JAX's default
    print(json.dumps({"machine": machine()}), flush=True)
    for line in sys.stdin:
        name, *batch = line.split()
        first = Attempt(int(batch[0]), batch[1]) if batch else None
        try:
            parts = {"matmul": matmul, "decoding": decoding}
            result = parts[name](toy=toy) if name in parts else train(name, first, toy=toy)
            print(json.dumps({"result": result}), flush=True)
        except Exception as error:
            traceback.print_exc()
            message = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
            print(json.dumps({"error": message}), flush=True)


if __name__ == "__main__":
    main(toy="--toy" in sys.argv)
