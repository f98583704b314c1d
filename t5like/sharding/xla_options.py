"""What XLA is asked for besides its defaults, by chip, each with its reason.

`step` hands these to `jax.jit`, so the trainer and `t5like plan` compile the same program. What each brings is in
benchmarks/RESULTS.md ("Effect of each change"); libtpu 0.0.42, which jax 0.10.2 asks for, and 0.0.52 know all of them.
"""

import contextlib
from collections.abc import Iterator

import jax
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh, SingleDeviceSharding

from t5like.config.schema import TrainConfig
from t5like.errors import ConfigError

Option = bool | int | str

NONE = "none"  # of train.compiler_options: none of those below

# Gradients are reduced over all of fsdp in every layer's backward pass, weights gathered in both passes. With libtpu's
# defaults a chip waits for the former, and on those with sparse cores for both.
_SPARSE_CORES = {  # They move the data while the matrix units go on; the table knows six kinds of transfer.
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": True,
}
OPTIONS: dict[str, dict[str, Option]] = {  # by JAX's name of the chip
    "TPU v5 lite": {
        # An all-reduce runs inside the product after it, as all-gathers do by default. No other chip can do that.
        "xla_enable_async_all_reduce": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
        # By default one all-reduce waits for the gradients of several products, and then nothing is left to hide it.
        # Those of norms are still joined: they are small, and each alone would cost a round of the network.
        "xla_jf_crs_combiner_threshold_in_bytes": 2**20,
    },
    "TPU v5": _SPARSE_CORES,  # v5p
    "TPU v6 lite": _SPARSE_CORES,
}


def of_chip(config: TrainConfig, mesh: Mesh) -> dict[str, Option]:
    """The options for the chips of a mesh; evaluation, which may run on other machines than training, has no more."""
    return {} if NONE in config.compiler_options else OPTIONS.get(mesh.devices.flat[0].device_kind, {})


def of_training(config: TrainConfig, mesh: Mesh) -> dict[str, Option]:
    """The options of the train step: the chip's, and then the config's own, which win."""
    own = dict(text.split("=", 1) for text in config.compiler_options if text != NONE)
    booleans = {"true": True, "false": False}
    return of_chip(config, mesh) | {name: booleans.get(value.lower(), value) for name, value in own.items()}


def check(config: TrainConfig, mesh: Mesh) -> None:
    """Compile an empty program with the config's own options, which takes no time.

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
    """Within, where a program is compiled, an option that the compiler does not take is the user's error.

    Raises:
        ConfigError: the compiler does not know an option, or not on this chip, or not its value.
    """
    try:
        yield
    except JaxRuntimeError as error:
        message = " ".join(str(error).split())
        if not any(words in message for words in ("compile option", "setting option", "Continuation fusion")):
            raise
        raise ConfigError(
            f"train.compiler_options: the compiler refuses one ({message[:160]}); leave it out, or use "
            f"--config.train.compiler_options={NONE} to do without those of compiler_options.py as well"
        ) from None
