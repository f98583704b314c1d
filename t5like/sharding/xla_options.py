"""XLA compiler options of a step: those of the chip (`chip_options`), and those of the config.

`step` passes them to `jax.jit`, so that the trainer and `t5like plan` compile the same program.
"""

import contextlib
from collections.abc import Iterator

import jax
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh, SingleDeviceSharding

from t5like.config.schema import TrainConfig
from t5like.errors import ConfigError
from t5like.sharding.chip_options import OPTIONS, Option

NONE = "none"  # value of train.compiler_options: none of those below


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
