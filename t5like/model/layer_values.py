"""Values inside of the layers of a model on a batch: the interface of `intermediates`."""

from collections.abc import Sequence

import jax

from t5like.config.schema import Config
from t5like.errors import ConfigError
from t5like.model import intermediates
from t5like.model.transformer import Transformer
from t5like.types import Batch, Tree


def compute_intermediates(
    config: Config, params: Tree, batch: Batch, names: Sequence[str], summary: intermediates.Summary | None = None
) -> dict[str, jax.Array]:
    """Values inside of the layers on a batch, without dropout: {"decoder/residual": [Y, B, L, D], ...}.

    Args:
        config: a resolved one.
        params: the model's parameters.
        batch: as in training.
        names: of `INTERMEDIATES`; each is returned for every stack that has it.
        summary: applied to each layer's value inside of the layer; then its results are returned, stacked.

    Raises:
        ConfigError: a name does not exist.
    """
    for name in names:
        if name not in intermediates.INTERMEDIATES:
            raise ConfigError(f"intermediates={name} must be one of {', '.join(intermediates.INTERMEDIATES)}")
    with intermediates.summarized(summary):
        _, variables = Transformer(config).apply({"params": params}, batch, method="hidden", mutable=list(names))
    return {
        f"{stack}/{name}": values["layers"] for name, stacks in variables.items() for stack, values in stacks.items()
    }
