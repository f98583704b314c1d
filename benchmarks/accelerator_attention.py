"""Attention on the default device, for `accelerator.py`: the model's own choice of kernel against plain and cuDNN.

`compare_values` compares outputs and gradients, `time_kernels` times. Everything goes through the model's entries:
`plan_attention` chooses the kernel, `RelativeBias` makes the bias that it takes, `attend` computes.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from t5like.config import schema
from t5like.config.model_schema import ModelConfig
from t5like.model.attention import attend
from t5like.model.attention_plan import plan_attention
from t5like.model.masks import MaskSpec
from t5like.model.positions import RelativeBias
from t5like.sharding import auto
from t5like.sharding import mesh as meshes

Key = TypeVar("Key", bound=Hashable)
BUCKETS = 32
DTYPES = ("float32", "bfloat16")
# The largest relative error, ||value - reference|| / ||reference||: float32 matmuls may use TF32, which has 10 bits.
# bfloat16 has 8 bits in each operand.
TOLERANCES = {"float32": 2e-3, "bfloat16": 1e-2}
OF_PLAIN = 1.5  # an error up to so many times that of plain attention in the same dtype is rounding, too


class Case(NamedTuple):
    """One attention."""

    rows: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int = 64
    biased: bool = False  # T5's relative bias
    causal: bool = False
    packed: bool = False  # two documents in a row, then padding
    prefix: int = 0  # keys that a causal mask does not hide
    window: int = 0

    @property
    def is_cross(self) -> bool:
        return self.queries != self.keys

    @property
    def flops(self) -> int:
        """Of the forward and the backward pass, as `metrics.flops` counts: all pairs of tokens."""
        return 3 * 4 * self.rows * self.heads * self.queries * self.keys * self.head_dim


VALUES = {
    "T5's encoder": Case(4, 12, 12, 512, 512, biased=True),
    "T5's decoder": Case(4, 12, 12, 114, 114, biased=True, causal=True),
    "T5's decoder to encoder": Case(4, 12, 12, 114, 512),
    "T5's encoder, packed": Case(4, 12, 12, 512, 512, biased=True, packed=True),
    "Llama": Case(2, 32, 4, 2048, 2048, causal=True),
    "decoder, packed, window, prefix": Case(2, 8, 2, 1024, 1024, 128, causal=True, packed=True, prefix=64, window=256),
}
SPEED = {
    "T5 base's encoder": Case(64, 12, 12, 512, 512, biased=True),
    "T5 base's decoder": Case(128, 12, 12, 114, 114, biased=True, causal=True),
    "T5 XL's encoder": Case(16, 32, 32, 512, 512, biased=True),
    "Llama 1B": Case(8, 32, 4, 2048, 2048, causal=True),
    "T5, 2,048 tokens": Case(4, 12, 12, 2048, 2048, biased=True),
}
TOY_VALUES = {
    "T5's encoder": Case(2, 2, 2, 32, 32, 16, biased=True),
    "decoder, packed, window, prefix": Case(2, 4, 2, 32, 32, 16, causal=True, packed=True, prefix=4, window=8),
}
TOY_SPEED = {"T5's encoder": Case(2, 2, 2, 32, 32, 16, biased=True)}


def model_config(case: Case, dtype: str, kernels: str) -> ModelConfig:
    """A config with this attention, resolved for the default device."""
    config = schema.Config(
        model=ModelConfig(
            num_heads=case.heads,
            num_kv_heads=case.kv_heads,
            head_dim=case.head_dim,
            positions="relative" if case.biased else "rotary",
            relative_buckets=BUCKETS,
            dtype=dtype,
            kernels=kernels,
        )
    )
    return auto.resolve_auto(config, device_mesh()).model


def inputs(case: Case, seed: int = 0) -> tuple[dict[str, jax.Array], MaskSpec, jax.Array]:
    """Random operands, mask and output gradient; all numbers are float32 and exact in bfloat16."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16).astype(jnp.float32)
    queries = (case.rows, case.heads, case.queries, case.head_dim)
    keys = (case.rows, case.kv_heads, case.keys, case.head_dim)
    operands = {"query": draw(*queries) * case.head_dim**-0.5, "key": draw(*keys), "value": draw(*keys)}
    operands["query"] = operands["query"].astype(jnp.bfloat16).astype(jnp.float32)
    if case.biased:
        operands["bias"] = draw(BUCKETS, case.heads)
    place = np.arange(case.keys)[None].repeat(case.rows, 0)
    segments_BS = jnp.asarray(np.select([place < case.keys // 3, place < case.keys - case.keys // 8], [1, 2], 0))
    mask = MaskSpec(
        causal=case.causal,
        window=case.window,
        query_segments_BL=segments_BS if case.packed else None,
        key_segments_BS=segments_BS if case.packed else None,
        prefix_BS=jnp.asarray(place < case.prefix) if case.prefix else None,
    )
    return operands, mask, draw(*queries)


def attention(case: Case, config: ModelConfig) -> tuple[Callable[..., jax.Array], str]:
    """The function (operands, mask) -> output, as a layer of the model computes it, and the name of its kernel."""
    if case.is_cross:
        plan = plan_attention(config, case.rows, case.queries, case.queries, case.keys)
        kernel = plan.cross_attention
    else:
        plan = plan_attention(config, case.rows, case.queries, case.keys)
        kernel = plan.self_attention
    module = RelativeBias(config, bidirectional=not case.causal)

    def function(operands: dict[str, jax.Array], mask: MaskSpec) -> jax.Array:
        bias = module.apply({"params": {"table": operands["bias"]}}, plan) if case.biased else None
        q, k, v = (operands[name].astype(config.dtype) for name in ("query", "key", "value"))
        return attend(q, k, v, bias_1NLS=bias, mask=mask, kernel=kernel)

    return function, kernel


def cudnn_attention(case: Case, config: ModelConfig) -> Callable[..., jax.Array]:
    """The same through cuDNN, in whose layout [B, L, N, H] the operands are."""
    plain = dataclasses.replace(config, kernels="plain")
    plan = plan_attention(plain, case.rows, case.queries, case.keys)
    module = RelativeBias(plain, bidirectional=not case.causal)

    def function(operands: dict[str, jax.Array], mask: MaskSpec) -> jax.Array:
        bias = module.apply({"params": {"table": operands["bias"]}}, plan) if case.biased else None
        q, k, v = (operands[name].astype(config.dtype) for name in ("query", "key", "value"))
        return jax.nn.dot_product_attention(q, k, v, bias, scale=1.0, is_causal=mask.causal, implementation="cudnn")

    return function


class Job(NamedTuple):
    """A function of operands and mask, and the arguments of `with_gradients` for it."""

    function: Callable[..., jax.Array]
    arguments: tuple


def with_gradients(function: Callable[..., jax.Array]) -> Callable[..., dict[str, jax.Array]]:
    """The compiled function (operands, mask, output gradient) -> output, and gradients by name."""

    def both(operands, mask, gradient):
        out, backward = jax.vjp(lambda operands: function(operands, mask), operands)
        return {"output": out} | backward(gradient.astype(out.dtype))[0]

    return jax.jit(both)


def compile_all(jobs: dict[Key, Job]) -> dict[Key, Callable[..., Any] | str]:
    """Programs of functions and their gradients, compiled on all cores; for one that can't be compiled, the reason."""
    programs: dict[Key, Callable[..., Any] | str] = {}
    with ThreadPoolExecutor() as pool:
        compiling = {}
        for key, (function, arguments) in jobs.items():
            try:
                compiling[key] = pool.submit(with_gradients(function).lower(*arguments).compile)
            except Exception as error:  # cuDNN and kernels refuse sizes by several types
                programs[key] = message(error)
        for key, future in compiling.items():
            error = future.exception()
            programs[key] = message(error) if error else future.result()
    return programs


def message(error: BaseException) -> str:
    """The beginning of a message as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def device_mesh() -> jax.sharding.Mesh:
    """The first device."""
    return meshes.make_mesh(schema.Config(), jax.devices()[:1])


# ---- Values ----


def compare_values(*, toy: bool) -> dict[str, Any]:
    """Errors of the chosen kernel and of plain attention, relative to plain attention in exact float32."""
    jobs, kernels, given = {}, {}, {}
    cases = TOY_VALUES if toy else VALUES
    with jax.set_mesh(device_mesh()):
        for name, case in cases.items():
            given[name] = inputs(case)
            for dtype in DTYPES:
                for kernel in ("auto", "plain"):
                    function, kernels[name, dtype, kernel] = attention(case, model_config(case, dtype, kernel))
                    jobs[name, dtype, kernel] = Job(function, given[name])
        programs = compile_all(jobs)
        with jax.default_matmul_precision("highest"):
            exact = {name: jobs[name, "float32", "plain"] for name in cases}
            references = compile_all(exact)
        rows = []
        for name in cases:
            reference = jax.device_get(references[name](*given[name]))
            for dtype in DTYPES:
                errors, of_plain = (
                    errors_of(programs[name, dtype, kernel], given[name], reference) for kernel in ("auto", "plain")
                )
                row = {"case": name, "dtype": dtype, "kernel": kernels[name, dtype, "auto"]}
                rows.append(row | judge(errors, of_plain, TOLERANCES[dtype]))
    return {"passed": all(row["passed"] for row in rows), "cases": rows}


def errors_of(program: Callable | str, given: tuple, reference: dict[str, np.ndarray]) -> dict[str, float] | str:
    """Relative errors of a program's results by name; or why it can't run."""
    if isinstance(program, str):
        return program
    try:
        return relative_errors(jax.device_get(program(*given)), reference)
    except Exception as error:  # of the device
        return message(error)


def judge(errors: dict[str, float] | str, of_plain: dict[str, float] | str, tolerance: float) -> dict[str, Any]:
    """Whether errors are small: not if one is NaN, or the kernel can't run."""
    row: dict[str, Any] = {"passed": False, "largest": None, "errors": errors, "plain": of_plain}
    if isinstance(errors, str) or isinstance(of_plain, str):
        return row
    passed = all(errors[name] <= max(tolerance, OF_PLAIN * of_plain[name]) for name in errors)
    return row | {"passed": passed, "largest": max(errors.values())}


def relative_errors(values: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> dict[str, float]:
    """||value - reference|| / ||reference|| of each array, in float64."""
    wide = lambda x: np.asarray(x, np.float64)
    norm = lambda x: float(np.linalg.norm(x.ravel()))
    return {name: norm(wide(values[name]) - wide(reference[name])) / norm(wide(reference[name])) for name in reference}


# ---- Speed ----


def time_kernels(*, toy: bool) -> dict[str, Any]:
    """Milliseconds of forward and backward pass, of the model's kernel, plain attention and cuDNN; bfloat16."""
    jobs, rows = {}, []
    with jax.set_mesh(device_mesh()):
        for name, case in (TOY_SPEED if toy else SPEED).items():
            config = model_config(case, "bfloat16", "auto")
            operands, mask, gradient = inputs(case)
            operands = {key: x if key == "bias" else x.astype(config.dtype) for key, x in operands.items()}
            gradient = gradient.astype(config.dtype)
            function, kernel = attention(case, config)
            plain, _ = attention(case, dataclasses.replace(config, kernels="plain"))
            jobs[name, "ours"] = Job(function, (operands, mask, gradient))
            jobs[name, "plain"] = Job(plain, (operands, mask, gradient))
            if jax.default_backend() == "gpu":
                swapped = {key: x if key == "bias" else x.swapaxes(1, 2) for key, x in operands.items()}
                arguments = swapped, mask, gradient.swapaxes(1, 2)
                jobs[name, "cudnn"] = Job(cudnn_attention(case, config), arguments)
                if case.biased:
                    unbiased = cudnn_attention(case._replace(biased=False), config)
                    jobs[name, "cudnn_unbiased"] = Job(unbiased, arguments)
            rows.append({"case": name, "kernel": kernel, "biased": case.biased, "tflop": case.flops / 1e12})
        programs = compile_all(jobs)
        for row in rows:
            for way in ("ours", "plain", "cudnn", "cudnn_unbiased"):
                program, job = (kept.get((row["case"], way)) for kept in (programs, jobs))
                row[f"{way}_ms"], row[f"{way}_error"] = try_to_time(program, job) if job else (None, None)
    return {"passed": all(row["ours_ms"] is not None for row in rows), "cases": rows}


def try_to_time(program: Callable | str, job: Job) -> tuple[float | None, str | None]:
    """Milliseconds of a program; or None and why it can't run, as when it exceeds the memory."""
    if isinstance(program, str):
        return None, program
    try:
        return milliseconds(program, *job.arguments), None
    except Exception as error:  # of the device
        return None, message(error)


def milliseconds(program: Callable, *arguments: Any, seconds: float = 0.2) -> float:
    """Median time of a call, over rounds of so many calls that the device never waits for Python."""
    jax.block_until_ready(program(*arguments))
    begin = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    count = max(1, min(100, int(seconds / 5 / (time.perf_counter() - begin))))
    rounds = []
    for _ in range(5):
        begin = time.perf_counter()
        results = None
        for _ in range(count):
            results = program(*arguments)
        jax.block_until_ready(results)
        rounds.append((time.perf_counter() - begin) / count)
    return 1e3 * statistics.median(rounds)
