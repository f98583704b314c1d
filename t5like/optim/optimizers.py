"""Optimizers by name, as one Optax chain.

Called by `step`. The order of the chain is: clip by the global norm, optimizer, weight decay, learning rate; frozen
parameters bypass all of it. `step` computes the moving average of the parameters.

The parameters of all layers of a stack are one array whose first logical axis is ``layers``; a layer's experts add an
axis ``experts`` after it. Everything that these optimizers compute per matrix (factors, clipping, scale,
orthogonalization) is computed separately for each layer and expert. The logical axes of a parameter decide what it is,
not its number of dims. Moments have the name and the shape of their parameter, except Adafactor's ``row`` and ``col``,
which are small enough to be replicated.

Sources: Adafactor as in T5 and T5X (Shazeer and Stern 2018, arXiv:1804.04235, algorithms 4 to 6; T5X ``adafactor.py``);
AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101); its steps scaled by the parameter's RMS as in nanoT5 (Nawrot 2023,
arXiv:2309.02373: plain AdamW diverged on T5); Lion (Chen et al. 2023, arXiv:2302.06675); Muon (Jordan et al. 2024,
kellerjordan.github.io/posts/muon) with the step size of Liu et al. 2025 (arXiv:2502.16982, section 2.2).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from t5like import tree
from t5like.config.schema import Config, OptimizerConfig
from t5like.errors import ConfigError
from t5like.optim import new_parameters, update_clipping
from t5like.optim.schedules import learning_rate
from t5like.types import Array, LogicalAxes, Tree

MIN_FACTORED_SIDE = 128  # Adafactor: a matrix with both sides at least this long keeps only row and column means
STACKED_AXES = frozenset({"layers", "experts"})  # logical axes along which matrices or vectors are stacked; they lead
TABLE_AXES = frozenset({"vocab", "positions", "token_types", "buckets", "classes"})  # rows or columns by index
MIN_RMS = 1e-3  # the parameter scale of a matrix that is (nearly) zero: epsilon_2 of Adafactor


def without_frozen_gradients(config: Config, params: Tree) -> Tree:
    """Stop the gradients of frozen parameters, so that XLA does not compute them."""
    return tree.map_named(
        lambda name, leaf: jax.lax.stop_gradient(leaf) if tree.matches(name, config.optimizer.frozen) else leaf, params
    )


def make_optimizer(config: Config, params: Tree, axes: LogicalAxes) -> optax.GradientTransformation:
    """Make the complete update rule of a config; ``apply_updates`` adds what it returns.

    Weight decay is decoupled and follows the learning rate: an update takes ``rate * weight_decay * parameter`` away.
    The rate of a parameter is the learning rate times its `rate_factor`. Frozen parameters get updates of exactly 0,
    have no state, and are not part of the clipped norm.

    Args:
        params: arrays or shapes; only names and shapes are read.
        axes: logical axes of every parameter by name (`step.parameter_axes`): which dims are matrix dims.

    Raises:
        ConfigError: a pattern of `no_decay` or `frozen` matches no parameter, or all parameters are frozen.
    """
    optimizer = config.optimizer
    frozen = tree.mask(params, optimizer.frozen, field="optimizer.frozen")
    if all(jax.tree.leaves(frozen)):
        raise ConfigError(f"optimizer.frozen={optimizer.frozen!r} must leave a parameter to train; use 'encoder/.*'")
    # Checked even without weight decay, and against all parameters: a LoRA run trains few of them.
    tree.mask(dict.fromkeys(axes, 0), optimizer.no_decay, field="optimizer.no_decay")
    rule = [_direction(optimizer, axes)]
    if optimizer.weight_decay:
        # a function, because its tree has no frozen leaves
        rule.append(
            optax.add_decayed_weights(
                optimizer.weight_decay,
                lambda params: tree.map_named(lambda name, _: not tree.matches(name, optimizer.no_decay), params),
            )
        )
    if optimizer.name == "stable_adamw":
        rule = [update_clipping.clip_updates(optimizer, optax.chain(*rule), lambda name, leaf: _rms(axes[name], leaf))]
    clip = [optax.clip_by_global_norm(optimizer.clip_norm)] if optimizer.clip_norm else []
    if config.init_from.warmup_steps:
        rule = [new_parameters.first_alone(config, optax.chain(*rule))]
    # Last, so that the names of the state's arrays do not depend on it: the factor may change when a run continues.
    rates = [optax.scale_by_learning_rate(learning_rate(config))]
    if any(rate_factor(optimizer, each) != 1 for each in axes.values()):
        scaled = lambda name, step: step * rate_factor(optimizer, axes[name])
        rates.append(optax.stateless(lambda updates, _: tree.map_named(scaled, updates)))
    chain = optax.chain(*clip, *rule, *rates)
    return optax.selective_transform(chain, freeze_mask=frozen)


def rate_factor(optimizer: OptimizerConfig, axes: tuple[str | None, ...]) -> float:
    """What the learning rate is multiplied by for a parameter with these logical axes."""
    return optimizer.adam_factor if optimizer.name == "muon" and not _is_layer_kernel(axes) else 1.0


def _direction(optimizer: OptimizerConfig, axes: LogicalAxes) -> optax.GradientTransformation:
    """The named optimizer, for a learning rate of 1 and without weight decay."""
    adam = optax.scale_by_adam(optimizer.b1, optimizer.b2, optimizer.epsilon)
    match optimizer.name:
        case "adafactor":
            return scale_by_adafactor(axes)
        case "adamw" | "stable_adamw":
            return adam
        case "adamw_rms":
            return optax.chain(adam, scale_by_parameter_rms(axes))
        case "lion":
            return optax.scale_by_lion(optimizer.b1, optimizer.b2)
        case "muon":
            # As its authors recommend, Muon updates the matrices of hidden layers; Adam updates embeddings, head,
            # tables and vectors.
            return optax.partition(
                {"muon": scale_by_muon(), "adam": adam},
                lambda params: tree.map_named(
                    lambda name, _: "muon" if _is_layer_kernel(axes[name]) else "adam", params
                ),
            )
    raise AssertionError(optimizer.name)


class Factors(NamedTuple):
    """Means of a matrix's squared gradient: of each row, ``[..., rows]``, and of each column, ``[..., columns]``."""

    row: Array
    col: Array


class AdafactorState(NamedTuple):
    """The number of updates, and for each parameter `Factors`, or its second moment if it is not factored."""

    count: Array
    moments: Tree


def scale_by_adafactor(axes: LogicalAxes) -> optax.GradientTransformation:
    """Adafactor with T5's settings: no momentum, beta2 = 1 - t**-0.8, clipped updates, steps scaled by the parameter.

    Kernels keep heads and head_dim in one dim, so that a matrix has two dims, which are the last ones.
    """

    def init(params: Tree) -> AdafactorState:
        return AdafactorState(jnp.zeros([], jnp.int32), tree.map_named(zeros, params))

    def zeros(name: str, param: Array) -> Factors | Array:
        if not _is_factored(axes[name], param):
            return jnp.zeros(param.shape, jnp.float32)
        rows, columns = param.shape[:-1], (*param.shape[:-2], param.shape[-1])
        return Factors(jnp.zeros(rows, jnp.float32), jnp.zeros(columns, jnp.float32))

    def update(grads: Tree, state: AdafactorState, params: Tree) -> tuple[Tree, AdafactorState]:
        count = state.count + 1
        beta2 = 1 - count.astype(jnp.float32) ** -0.8
        moments = tree.map_named(lambda name, grad, old: moment(name, grad, old, beta2), grads, state.moments)
        return tree.map_named(direction, grads, moments, params), AdafactorState(count, moments)

    def moment(name: str, grad: Array, old: Factors | Array, beta2: Array) -> Factors | Array:
        square = grad**2 + 1e-30  # epsilon_1
        if not _is_factored(axes[name], grad):
            return beta2 * old + (1 - beta2) * square
        return Factors(beta2 * old.row + (1 - beta2) * square.mean(-1), beta2 * old.col + (1 - beta2) * square.mean(-2))

    def direction(name: str, grad: Array, moment: Factors | Array, param: Array) -> Array:
        if _is_factored(axes[name], grad):
            row = jax.lax.rsqrt(moment.row / moment.row.mean(-1, keepdims=True))
            step = grad * row[..., :, None] * jax.lax.rsqrt(moment.col)[..., None, :]
        else:
            step = grad * jax.lax.rsqrt(moment)
        return step * (_scale(axes[name], param) / jnp.maximum(1, _rms(axes[name], step)))  # clipping threshold 1

    return optax.GradientTransformation(init, update)


def scale_by_parameter_rms(axes: LogicalAxes) -> optax.GradientTransformation:
    """Multiply each matrix's step by the parameter's RMS, so that steps are relative to it, as in Adafactor."""
    return optax.stateless(
        lambda updates, params: tree.map_named(
            lambda name, step, param: step * _scale(axes[name], param), updates, params
        )
    )


def scale_by_muon() -> optax.GradientTransformation:
    """Muon for leaves ``[..., fan_in, fan_out]``: orthogonal steps with the usual RMS of AdamW's.

    That RMS, 0.2, lets Muon and the Adam of the other parameters share one learning rate and weight decay.
    """

    def each_matrix(updates: Tree) -> Tree:
        return jax.tree.map(lambda step: contrib.MuonDimensionNumbers(step.ndim - 2, step.ndim - 1), updates)

    def resize(updates: Tree, _: Tree) -> Tree:
        return jax.tree.map(lambda step: step * (0.2 * max(step.shape[-2:]) ** 0.5), updates)

    return optax.chain(contrib.scale_by_muon(weight_dimension_numbers=each_matrix), optax.stateless(resize))


def _matrix_dims(axes: tuple[str | None, ...]) -> tuple[int, ...]:
    """The dims of one matrix or vector, without those that stack several of them."""
    return tuple(dim for dim, name in enumerate(axes) if name not in STACKED_AXES)


def _is_factored(axes: tuple[str | None, ...], leaf: Array) -> bool:
    return len(_matrix_dims(axes)) == 2 and min(leaf.shape[-2:]) >= MIN_FACTORED_SIDE


def _is_layer_kernel(axes: tuple[str | None, ...]) -> bool:
    return "layers" in axes and len(_matrix_dims(axes)) == 2 and TABLE_AXES.isdisjoint(axes)


def _rms(axes: tuple[str | None, ...], leaf: Array) -> Array:
    """Root mean square of each matrix or vector, with all dims kept."""
    return jnp.sqrt(jnp.mean(leaf**2, _matrix_dims(axes), keepdims=True))


def _scale(axes: tuple[str | None, ...], param: Array) -> Array:
    return jnp.maximum(MIN_RMS, _rms(axes, param))
