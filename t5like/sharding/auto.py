"""Config fields that are `auto`: replaced by what suits the devices of the mesh."""

import dataclasses

from jax.sharding import Mesh

from t5like.config.schema import Config
from t5like.errors import ConfigError


def resolve_auto(config: Config, mesh: Mesh) -> Config:
    """Replace every `auto` of the model by what suits the mesh's devices (which need not be this process's own)."""
    return resolve_auto_for(config, mesh.devices.flat[0].platform, mesh.shape["context"])


def resolve_auto_for(config: Config, platform: str, context: int | None = None) -> Config:
    """`settle` for devices that are only known by JAX's name of their platform: cpu, gpu or tpu.

    Raises:
        ConfigError: kernels that this platform can't run.
    """
    model, context = config.model, config.mesh.context if context is None else context
    if model.kernels == "tpu" and platform != "tpu":
        raise ConfigError(
            f"model.kernels=tpu can't run on {platform}; use --config.model.kernels=auto, which chooses by the machine"
        )
    best = {"cpu": "cpu" if context == 1 else "plain", "tpu": "tpu"}.get(platform, "plain")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            model,
            dtype=("float32" if platform == "cpu" else "bfloat16") if model.dtype == "auto" else model.dtype,
            # A scanned stack compiles in a time that does not grow with depth, but runs 20-25 % slower on a CPU.
            layers=("unroll" if platform == "cpu" else "scan") if model.layers == "auto" else model.layers,
            # The CPU's products flatten rows and their length, which would gather a length that is split.
            kernels=best if model.kernels == "auto" else model.kernels,
        ),
    )
