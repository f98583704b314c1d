"""Resolves config fields that are `auto` by the devices of the mesh."""

import dataclasses

import jax
from jax.sharding import Mesh

from t5like.config.schema import Config
from t5like.errors import ConfigError

FUSED = ("tpu", "gpu")  # of model.kernels: their attention writes no scores to main memory
FIRST_FUSED_CAPABILITY = 8.0  # of NVIDIA's GPUs: A100


def resolve_auto(config: Config, mesh: Mesh) -> Config:
    """Resolve every `auto` field of the model for the mesh's devices (which need not belong to this process)."""
    device = mesh.devices.flat[0]
    return resolve_auto_for(config, device.platform, mesh.shape["context"], fused=_runs_fused_kernels(device))


def _runs_fused_kernels(device: jax.Device) -> bool:
    """Whether a GPU can run the fused kernel: NVIDIA's, new enough. AMD names its capabilities by letters."""
    capability = str(getattr(device, "compute_capability", FIRST_FUSED_CAPABILITY))
    return capability[:1].isdigit() and float(capability) >= FIRST_FUSED_CAPABILITY


def resolve_auto_for(config: Config, platform: str, context: int | None = None, *, fused: bool = True) -> Config:
    """`resolve_auto` for devices of which only JAX's platform name is known: cpu, gpu or tpu.

    Args:
        config: any.
        platform: JAX's name.
        context: devices along this axis of the mesh, if it is known.
        fused: whether a GPU can run the fused kernel.

    Raises:
        ConfigError: this platform can't run the kernels.
    """
    model, context = config.model, config.mesh.context if context is None else context
    if model.kernels in FUSED and (model.kernels != platform or (platform == "gpu" and not fused)):
        raise ConfigError(
            f"model.kernels={model.kernels} can't run on {platform if fused else 'this GPU'}; "
            "use --config.model.kernels=auto, which chooses by the machine"
        )
    best = {"cpu": "cpu" if context == 1 else "plain", "tpu": "tpu", "gpu": "gpu" if fused else "plain"}.get(
        platform, "plain"
    )
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
