"""Losses of the head that predicts labels, as sums over its targets. Called by `step.pretrain_loss`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from t5like.config.schema import Config
from t5like.model.transformer import Transformer
from t5like.optim import losses
from t5like.types import Batch, Sum, Tree


def label_loss(
    config: Config,
    params: Tree,
    hidden_BSD: jax.Array,
    batch: Batch,
    key: jax.Array | None,
    taught: tuple[jax.Array, Callable[..., losses.Loss]] | None = None,
) -> losses.Loss:
    """Cross entropy of labels, with `train.z_loss` and `train.label_smoothing`; squared error of a regression.

    Args:
        hidden_BSD: the encoder's output.
        key: of dropout; None: none.
        taught: see `step.pretrain_loss`.
    """
    rngs = None if key is None else {"dropout": key}
    logits_BSC = Transformer(config).apply(
        {"params": params},
        hidden_BSD,
        batch.encoder_segments_BS,
        train=key is not None,
        method="label_logits",
        rngs=rngs,
    )
    components = {"component_B1": batch.component_B1, "num_components": len(config.data.source)}
    if config.data.label_objective == "regression":
        return squared_error(logits_BSC[..., 0], batch.targets_BL, batch.weights_BL, **components)
    loss = losses.cross_entropy(
        logits_BSC,
        batch.targets_BL,
        batch.weights_BL,
        vocab_size=config.data.num_outputs,
        z_loss=config.train.z_loss,
        label_smoothing=config.train.label_smoothing,
        **components,
    )
    return taught[1](loss, logits_BSC, batch.weights_BL, taught[0]) if taught else loss


def squared_error(
    predicted_BS: jax.Array,
    targets_BS: jax.Array,
    weights_BS: jax.Array,
    *,
    component_B1: jax.Array | None = None,
    num_components: int = 1,
) -> losses.Loss:
    """Squared differences of predictions and targets, in the unit of the targets squared; arguments float32 [B, S].

    The objective and the metric `loss` are the weighted sum, with `by_component` as in `losses.cross_entropy`.
    """
    squares_BS = jnp.square(predicted_BS - targets_BS) * weights_BS
    metrics = {"loss": Sum(squares_BS.sum(), weights_BS.sum())}
    if component_B1 is not None:
        sums = (x_BS.sum(1, keepdims=True) for x_BS in (squares_BS, weights_BS))
        metrics["by_component"] = Sum(*(losses.sum_by_component(x, component_B1, num_components) for x in sums))
    return losses.Loss(squares_BS.sum(), metrics)
