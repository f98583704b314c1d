"""Statistics of each layer and parameter at a step: activations, gradients, updates (`train.stats_every`).

A program of its own computes them from the state before the step and its batch: the gradient as in the step, the
update that the optimizer makes of it, and a forward pass without dropout. So the train step is the same program with
and without statistics, and a run that computes them has bitwise the same parameters. The cost of a step with statistics
is one more step and a forward pass.

Names: ``encoder/layers/3/mlp/in/kernel/gradient_norm``, one for each layer of a stack. Of a parameter: ``norm`` (L2, of
the parameter), ``gradient_norm``, ``update_norm``, ``update_ratio`` (update_norm / norm; about 0.001 is usual, by the
notes of Stanford's CS231n, "Ratio of weights:updates"). Of an activation of `ACTIVATIONS`, over the positions that are
not padding: ``rms``, ``max`` (of absolute values), ``zeros`` (share of exact zeros), ``dead`` (share of the features
that are 0 at every position).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from t5like import tree
from t5like.config.schema import Config
from t5like.model.layer_values import compute_intermediates
from t5like.optim.distillation import rows_of
from t5like.optim.optimizers import make_optimizer
from t5like.optim.step import LossFn, ModelBatch, make_gradient, pretrain_loss, split_microbatches, unchanged
from t5like.optim.train_state import mesh_of, model_params, parameter_axes
from t5like.sharding import placement, xla_options
from t5like.types import Array, Batch, TrainState, Tree

ACTIVATIONS = ("attention_output", "cross_attention_output", "mlp_hidden", "mlp_output", "residual")
OF_ACTIVATION = ("rms", "max", "zeros", "dead")
OF_PARAMETER = ("norm", "gradient_norm", "update_norm", "update_ratio")


def make_statistics(
    config: Config, loss_fn: LossFn = pretrain_loss, model_batch: ModelBatch = unchanged
) -> Callable[[TrainState, Any], dict[str, Array]]:
    """The function (state before the step, batch) -> statistics, stacked: [Y, 4] for layers, [4] for the others.

    Activations are those of the first microbatch.
    """
    gradient, microbatches = make_gradient(config, loss_fn), config.train.microbatches

    def statistics(state: TrainState, batch: Any) -> dict[str, Array]:
        grads, _ = gradient(state.params, batch, state.step, state.base)
        optimizer = make_optimizer(config, state.params, parameter_axes(config, model_batch(batch)))
        updates, _ = optimizer.update(grads, state.opt_state, state.params)
        norms = [norms_by_layer(part) for part in (state.params, grads, updates)]
        values = {}
        for name, size in norms[0].items():
            gradient_norm, update_norm = norms[1][name], norms[2][name]
            ratio = update_norm / jnp.maximum(size, 1e-30)
            values[name] = jnp.stack([size, gradient_norm, update_norm, ratio], -1)
        batch = rows_of(batch)
        part = batch if microbatches == 1 else jax.tree.map(lambda x: x[0], split_microbatches(batch, microbatches))
        return values | activation_statistics(config, model_params(state), model_batch(part))

    return statistics


def activation_statistics(config: Config, params: Tree, batch: Batch) -> dict[str, Array]:
    """``encoder/layers/residual``: float32 [Y, 4], `OF_ACTIVATION` of every layer, and so on for `ACTIVATIONS`."""
    segments = {"encoder": batch.encoder_segments_BS, "decoder": batch.decoder_segments_BL}

    def summary(stack: str, _: str, x: Array) -> Array:
        x_BLF, real_BL = x.astype(jnp.float32), segments[stack]
        real_BL1 = jnp.ones((*x.shape[:2], 1), bool) if real_BL is None else (real_BL > 0)[..., None]
        x_BLF = jnp.where(real_BL1, x_BLF, 0.0)
        elements = jnp.maximum(jnp.sum(real_BL1, dtype=jnp.float32) * x.shape[-1], 1.0)
        not_zero_BLF = x_BLF != 0
        zeros = 1 - jnp.sum(not_zero_BLF, dtype=jnp.float32) / elements
        dead = 1 - jnp.mean(not_zero_BLF.any((0, 1)), dtype=jnp.float32)
        return jnp.stack([jnp.sqrt(jnp.sum(x_BLF**2) / elements), jnp.abs(x_BLF).max(), zeros, dead])

    values = compute_intermediates(config, params, batch, ACTIVATIONS, summary)
    return {name.replace("/", "/layers/"): value for name, value in values.items()}


def norms_by_layer(params: Tree) -> dict[str, Array]:
    """The L2 norm of each leaf by name; of a leaf that stacks layers, those of its layers: float32 [Y] or scalar."""

    def norm(name: str, leaf: Array) -> Array:
        dims = tuple(range(1 if is_stacked(name) else 0, leaf.ndim))
        return jnp.sqrt(jnp.sum(leaf.astype(jnp.float32) ** 2, dims))

    return {name: norm(name, leaf) for name, leaf in tree.flatten(params).items()}


def is_stacked(name: str) -> bool:
    """Whether a parameter or an activation stacks the layers of its stack."""
    return "layers" in name.split("/")


def of_layer(name: str, layer: int) -> str:
    """The name of one layer's part: ``encoder/layers/mlp/in/kernel`` -> ``encoder/layers/3/mlp/in/kernel``."""
    return name.replace("/layers/", f"/layers/{layer}/", 1)


def by_name(stacked: Mapping[str, Array]) -> dict[str, float]:
    """The result of `make_statistics`, on the host, as a number for each name."""
    values = {}
    for name, array in stacked.items():
        columns = OF_ACTIVATION if name.rpartition("/")[2] in ACTIVATIONS else OF_PARAMETER
        rows = enumerate(np.asarray(array)) if is_stacked(name) else [(None, np.asarray(array))]
        for layer, row in rows:
            prefix = name if layer is None else of_layer(name, layer)
            values |= {f"{prefix}/{column}": float(x) for column, x in zip(columns, row, strict=True)}
    return values


def compile_statistics(
    config: Config, batch: Any, abstract: TrainState, loss_fn: LossFn = pretrain_loss, model_batch=unchanged
) -> jax.stages.Compiled:
    """`make_statistics`, compiled from shapes alone as `step.compile_train_step`; the state is not donated."""
    mesh = mesh_of(abstract)
    out, options = NamedSharding(mesh, PartitionSpec()), xla_options.of_training(config.train, mesh)
    shapes = placement.abstract_batch(batch, mesh)
    with jax.set_mesh(mesh), xla_options.refusals():
        program = jax.jit(make_statistics(config, loss_fn, model_batch), out_shardings=out, compiler_options=options)
        return program.lower(abstract, shapes).compile()
