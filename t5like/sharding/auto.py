"""Resolves config fields that are `auto` by the devices of the mesh."""

import dataclasses

from jax.sharding import Mesh

from t5like.config.schema import Config
from t5like.errors import ConfigError


def resolve_auto(config: Config, mesh: Mesh) -> Config:
    """Resolve every `auto` field of the model for the mesh's devices (which need not belong to this process)."""
    return resolve_auto_for(config, mesh.devices.flat[0].platform, mesh.shape["context"])


def resolve_auto_for(config: Config, platform: str, context: int | None = None) -> Config:
    """`resolve_auto` for devices of which only JAX's platform name is known: cpu, gpu or tpu.

    Raises:
        ConfigError: this platform can't run the kernels.
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
            # The compile time of a scanned stack does not grow with depth, but it runs 20-25 % slower on a CPU.
            layers=("unroll" if platform == "cpu" else "scan") if model.layers == "auto" else model.layers,
            # The CPU's matmuls flatten rows and length, which would gather a length that is split.
            kernels=best if model.kernels == "auto" else model.kernels,
        ),
    )
