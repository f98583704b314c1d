"""The train step as a pure function: loss, gradients over microbatches, update.

Pretraining, fine-tuning, the planner and the tests all use `make_train_step`; a new loss on the same batch is another
`LossFn`. This module does no I/O and no logging. `compile_train_step` compiles the step without data, `train` runs it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from t5like import tree
from t5like.config.schema import Config
from t5like.data.objectives.denoisers import num_components
from t5like.model.transformer import Transformer
from t5like.optim import bad_steps, few_targets, losses, new_parameters
from t5like.optim.label_loss import label_loss
from t5like.optim.optimizers import make_optimizer, without_frozen_gradients
from t5like.optim.schedules import learning_rate
from t5like.optim.train_state import mesh_of, parameter_axes, shardings_of
from t5like.sharding import allocator, placement, xla_options
from t5like.types import Array, Batch, Metrics, Sum, Taught, TrainState, Tree, add_metrics

# config, params, batch, dropout key or None; of a batch `Taught` its rows, and at the end its teacher
LossFn = Callable[..., losses.Loss]
ModelBatch = Callable[[Any], Batch]  # of what a `LossFn` takes, the batch that the model reads


def unchanged(batch: Batch) -> Batch:
    """The `ModelBatch` of losses that take a `Batch`."""
    return batch


def pretrain_loss(
    config: Config,
    params: Tree,
    batch: Batch,
    key: jax.Array | None,
    taught: tuple[Array, Callable[..., losses.Loss]] | None = None,
) -> losses.Loss:
    """Cross entropy of the targets, at most `head_length` of a row, summed over their weights; `key` None: no dropout.

    `taught`: hidden values [B, L, ...] of another model, and a function that adds its loss at some positions: (loss,
    logits, weights, hidden values) -> loss. Of an objective that predicts labels, the loss is `label_loss`.

    Auxiliary losses of the model's layers (`types.Auxiliary`) are added, and for sentence pairs `losses.next_sentence`.
    Rows of several components have metrics by component: nats and weights, and the number of rows that have a target.
    """
    components = num_components(config)
    model = Transformer(config)
    rngs = None if key is None else {"dropout": key}
    hidden_BLD, auxiliary = model.apply({"params": params}, batch, train=key is not None, method="hidden", rngs=rngs)

    def head(hidden, targets_BL, weights_BL):
        logits_BLV = model.apply({"params": params}, hidden[0], method="logits")
        loss = losses.cross_entropy(
            logits_BLV,
            targets_BL,
            weights_BL,
            vocab_size=config.tokenizer.vocab_size,
            z_loss=config.train.z_loss,
            label_smoothing=config.train.label_smoothing,
            component_B1=batch.component_B1,
            num_components=components,
        )
        return taught[1](loss, logits_BLV, weights_BL, hidden[1]) if taught else loss

    hidden = (hidden_BLD, taught[0]) if taught else (hidden_BLD,)
    if config.data.label_objective:
        loss = label_loss(config, params, hidden_BLD, batch, key, taught)
    else:
        read = few_targets.at_targets(config, hidden, batch)
        loss = losses.in_chunks(head, *read, config.train.loss_chunk) if config.train.loss_chunk else head(*read)
    if batch.component_B1 is not None:
        rows_B1 = (batch.weights_BL > 0).any(1, keepdims=True)
        rows = losses.sum_by_component(rows_B1, batch.component_B1, components)
        loss = loss._replace(metrics=loss.metrics | {"rows_by_component": Sum(rows, rows)})
    if batch.follows_B1 is not None:
        logits_B2 = model.apply({"params": params}, hidden_BLD, method="pair_logits")
        num_masked = max(round(config.data.noise_density * config.data.inputs_length), 1)
        pairs = losses.next_sentence(logits_B2, batch.follows_B1, row_weight=num_masked)
        loss = losses.Loss(loss.objective + pairs.objective, loss.metrics | pairs.metrics)
    for name, extra in auxiliary.losses.items():
        loss = losses.Loss(loss.objective + extra.total, loss.metrics | {name: extra})
    return loss._replace(metrics=loss.metrics | auxiliary.statistics)


def make_gradient(config: Config, loss_fn: LossFn = pretrain_loss) -> Callable[..., tuple[Tree, Metrics]]:
    """The function (params, batch, step, base) -> (gradient of the mean loss per target, metrics), over microbatches.

    The gradient is with respect to `params`; `base`: see `TrainState`.
    """
    microbatches = config.train.microbatches

    def of_part(params: Tree, batch: Batch, key: jax.Array, base: Tree | None, *teacher: Tree) -> tuple[Tree, Metrics]:
        def objective(params):
            whole = tree.merged(base, without_frozen_gradients(config, params))
            loss = loss_fn(config, whole, batch, key, *teacher)
            return loss.objective, loss.metrics

        return jax.grad(objective, has_aux=True)(params)

    def gradient(params: Tree, batch: Batch, step: jax.Array, base: Tree | None = None) -> tuple[Tree, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), step)  # of dropout; the state has no random key
        batch, *teacher = batch if isinstance(batch, Taught) else (batch,)
        if microbatches == 1:
            grads, metrics = of_part(params, batch, key, base, *teacher)
        else:
            parts = split_microbatches(batch, microbatches)

            def accumulate(sums, part):
                index, rows = part
                grads, metrics = of_part(params, rows, jax.random.fold_in(key, index), base, *teacher)
                return (jax.tree.map(jnp.add, sums[0], grads), add_metrics(sums[1], metrics, jnp.maximum)), None

            shapes = jax.eval_shape(of_part, params, jax.tree.map(lambda x: x[0], parts), key, base, *teacher)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            (grads, metrics), _ = jax.lax.scan(accumulate, zeros, (jnp.arange(microbatches), parts))
        weight = jnp.maximum(metrics["loss"].weight, 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)  # the one division: over all parts and devices
        return new_parameters.alone_at_first(config, grads, step), metrics

    return gradient


def make_train_step(
    config: Config, loss_fn: LossFn = pretrain_loss, model_batch: ModelBatch = unchanged
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """The function of one update: (state, batch) -> (new state, metrics). Jit it with `jit_train_step`.

    `loss_fn` may take more than a `Batch`: any tree of arrays with one leading dim, whose `Batch` is `model_batch`.

    An update that is not finite, or is a spike, is skipped (`bad_steps`): parameters, moments and average stay, the
    step is counted, and the metric `skipped_updates` is 1. The gradient of frozen parameters is not computed and not
    part of its norm.
    """
    gradient = make_gradient(config, loss_fn)

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        grads, metrics = gradient(state.params, batch, state.step, state.base)
        batch = model_batch(batch)
        norm = optax.tree.norm(grads)
        optimizer = make_optimizer(config, state.params, parameter_axes(config, batch))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        good, recent, verdict = bad_steps.judge(config, state.recent, state.step, metrics["loss"], norm, updates)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(partial(jnp.where, good), (params, opt_state), (state.params, state.opt_state))
        ema = state.ema
        if ema is not None:
            decay = config.optimizer.ema_decay
            ema = jax.tree.map(lambda old, new: jnp.where(good, decay * old + (1 - decay) * new, old), ema, params)
        one, tokens = jnp.ones(()), real_tokens(batch)
        metrics |= {
            "grad_norm": Sum(norm, one),
            "learning_rate": Sum(learning_rate(config)(state.step), one),
            **verdict,
            "tokens": Sum(tokens, one),
            "packing_efficiency": Sum(
                tokens, jnp.float32(sum(x.size for x in (batch.encoder_BS, batch.decoder_BL) if x is not None))
            ),
        }
        return TrainState(state.step + 1, params, opt_state, ema, recent, state.base), metrics

    return train_step


def real_tokens(batch: Batch) -> jax.Array:
    """Number of input and target tokens without padding; the decoder of an encoder-decoder counts its targets."""

    def real(ids, segments):
        return jnp.full((), ids.size, jnp.float32) if segments is None else jnp.sum(segments != 0, dtype=jnp.float32)

    encoder = 0.0 if batch.encoder_BS is None else real(batch.encoder_BS, batch.encoder_segments_BS)
    if batch.decoder_BL is None:
        return encoder
    if batch.encoder_BS is None and batch.decoder_segments_BL is not None:
        return real(batch.decoder_BL, batch.decoder_segments_BL)
    targets_BL = batch.weights_BL > 0
    tokens_BL = targets_BL if batch.prefix_BL is None else targets_BL | batch.prefix_BL
    return encoder + jnp.sum(tokens_BL, dtype=jnp.float32)


def split_microbatches(batch: Batch, count: int) -> Batch:
    """[B, ...] -> [count, B / count, ...]; part m holds rows m, m + count, ...

    Rows are dealt round-robin, so that each part is split over all devices of the batch and no row moves.
    """
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0), batch)


def jit_train_step(
    config: Config, abstract: TrainState, loss_fn: LossFn = pretrain_loss, model_batch: ModelBatch = unchanged
):
    """The jitted train step: state donated, with the shardings of `abstract_state`; metrics replicated."""
    mesh = mesh_of(abstract)
    out = (shardings_of(abstract), NamedSharding(mesh, PartitionSpec()))
    options = xla_options.of_training(config.train, mesh)
    train_step = make_train_step(config, loss_fn, model_batch)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out, compiler_options=options)


def lower_train_step(
    config: Config,
    batch: Any,
    abstract: TrainState,
    loss_fn: LossFn = pretrain_loss,
    model_batch: ModelBatch = unchanged,
) -> jax.stages.Lowered:
    """Lower the train step from shapes alone, for the loop (`compile_train_step`) and for planning."""
    mesh = mesh_of(abstract)
    with jax.set_mesh(mesh):
        program = jit_train_step(config, abstract, loss_fn, model_batch)
        return program.lower(abstract, placement.abstract_batch(batch, mesh))


def compile_train_step(
    config: Config,
    batch: Any,
    abstract: TrainState,
    loss_fn: LossFn = pretrain_loss,
    model_batch: ModelBatch = unchanged,
) -> jax.stages.Compiled:
    """The train step for the loop, compiled from shapes alone.

    Raises:
        ConfigError: the compiler refuses one of `train.compiler_options`.
    """
    with xla_options.refusals(), allocator.trimmed():
        return lower_train_step(config, batch, abstract, loss_fn, model_batch).compile()
