"""XLA compiler options by chip, each with its reason.

`step` passes them to `jax.jit`, so that the trainer and `t5like plan` compile the same program. benchmarks/RESULTS.md
("Effect of each change") has the measurements. libtpu 0.0.42, which jax 0.10.2 requires, and 0.0.52 accept all of them;
jaxlib 0.10.2 and 0.11.2 those for GPUs; docs/scaling.md says which options of other guides are left out, and why.
"""

import contextlib
from collections.abc import Iterator

import jax
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh, SingleDeviceSharding

from t5like.config.schema import TrainConfig
from t5like.errors import ConfigError

Option = bool | int | str

NONE = "none"  # value of train.compiler_options: none of those below

# Gradients are reduced over fsdp in the backward pass of every layer, weights are gathered in both passes. With
# libtpu's defaults the reductions are exposed; on chips with sparse cores the gathers are exposed as well.
_SPARSE_CORES = {  # Sparse cores transfer the data while the matrix units compute.
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": True,
}
OPTIONS: dict[str, dict[str, Option]] = {  # by JAX's name of the chip
    "TPU v5 lite": {
        # An all-reduce runs inside the matmul after it, as all-gathers do by default. No other chip can do that.
        "xla_enable_async_all_reduce": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
        # By default one all-reduce waits for the gradients of several matmuls, and then no work is left to hide it.
        # Gradients of norms are still combined: they are small, and each all-reduce has the latency of the network.
        "xla_jf_crs_combiner_threshold_in_bytes": 2**20,
    },
    "TPU v5": _SPARSE_CORES,  # v5p
    "TPU v6 lite": _SPARSE_CORES,
    "NVIDIA": {  # all of them
        # Each trip through a loop of layers gathers the weights of the next trip, and reduces the gradients of the last
        # one, behind its matmuls. Two trips are one body, which then swaps the buffers that it would copy.
        "xla_gpu_enable_pipelined_all_gather": True,
        "xla_gpu_enable_pipelined_all_reduce": True,  # also what becomes a reduce-scatter
        "xla_gpu_enable_while_loop_double_buffering": True,
    },
}


def of_chip(config: TrainConfig, mesh: Mesh) -> dict[str, Option]:
    """The options for the chips of a mesh; evaluation, which may run on other machines, uses only these."""
    kind = mesh.devices.flat[0].device_kind
    return {} if NONE in config.compiler_options else OPTIONS.get(kind, OPTIONS.get(kind.split()[0], {}))


def of_training(config: TrainConfig, mesh: Mesh) -> dict[str, Option]:
    """The options of the train step: the chip's, overridden by those of the config."""
    configured = dict(text.split("=", 1) for text in config.compiler_options if text != NONE)
    booleans = {"true": True, "false": False}
    return of_chip(config, mesh) | {name: booleans.get(value.lower(), value) for name, value in configured.items()}


def check(config: TrainConfig, mesh: Mesh) -> None:
    """Compile a trivial program with the config's options.

    Raises:
        ConfigError: see `refusals`.
    """
    if config.compiler_options:
        with refusals():
            device = SingleDeviceSharding(mesh.local_devices[0])
            shape = jax.ShapeDtypeStruct((), "float32", sharding=device)
            jax.jit(lambda x: x + 1, compiler_options=of_training(config, mesh)).lower(shape).compile()


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Context of a compilation: an option that the compiler refuses becomes a `ConfigError`.

    Raises:
        ConfigError: the compiler refuses an option, its value, or the option on this chip.
    """
    try:
        yield
    except JaxRuntimeError as error:
        message = " ".join(str(error).split())
        if not any(words in message for words in ("compile option", "setting option", "Continuation fusion")):
            raise
        raise ConfigError(
            f"train.compiler_options: the compiler refuses one ({message[:160]}); leave it out, or use "
            f"--config.train.compiler_options={NONE} to use no options of xla_options.py either"
        ) from None
