"""The evaluation step: sums of the metrics of `step`'s losses, without gradients and dropout. `heldout` calls it."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5like.config.schema import Config, TrainConfig
from t5like.optim.step import LossFn, pretrain_loss, split_microbatches
from t5like.sharding import xla_options
from t5like.types import Batch, Metrics, Tree, add_metrics

MOST_PROGRAMS = 8  # that are kept
_jitted: dict[tuple, Callable[[Tree, Batch, Metrics], Metrics]] = {}  # by what they depend on


def make_eval_step(config: Config, loss_fn: LossFn = pretrain_loss) -> Callable[[Tree, Batch, Metrics], Metrics]:
    """The function (params, batch, sums so far) -> sums with this batch, by microbatches too, without dropout."""
    microbatches = config.train.microbatches

    def eval_step(params: Tree, batch: Batch, total: Metrics) -> Metrics:
        def add(total, rows):
            return add_metrics(total, loss_fn(config, params, rows, None).metrics, jnp.maximum), None

        if microbatches == 1:
            return add(total, batch)[0]
        return jax.lax.scan(add, total, split_microbatches(batch, microbatches))[0]

    return eval_step


def zero_metrics(config: Config, params: Tree, batch: Batch, loss_fn: LossFn = pretrain_loss) -> Metrics:
    """The initial sums of an evaluation: numpy zeros with the shapes of the loss's metrics on such a batch.

    `params` and `batch` give shapes only, `config` is resolved; nothing is computed.
    """
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # without shardings
    metrics = lambda params, batch: loss_fn(config, params, batch, None).metrics
    shapes = jax.eval_shape(metrics, *jax.tree.map(shape, (params, batch)))
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


def jit_eval_step(config: Config, mesh: Mesh, loss_fn: LossFn = pretrain_loss):
    """The jitted evaluation step; parameters and batch keep the shardings of the arguments.

    A process that evaluates several runs, which differ in their optimizer, steps or texts only, compiles it once.
    """
    without = {name: getattr(Config(), name) for name in ("seed", "optimizer", "init_from", "evaluate", "metrics")}
    data, tokenizer = config.data, dataclasses.replace(config.tokenizer, path="")
    without["data"] = dataclasses.replace(data, source=("",) * len(data.source), source_names=(), cache_directory="")
    steps = {name: getattr(config.train, name) for name in ("microbatches", "z_loss", "label_smoothing", "loss_chunk")}
    train = TrainConfig(**steps, compiler_options=config.train.compiler_options)
    key = (dataclasses.replace(config, **without, tokenizer=tokenizer, train=train), mesh, loss_fn)
    if key not in _jitted:
        while len(_jitted) >= MOST_PROGRAMS:
            del _jitted[next(iter(_jitted))]
        out = NamedSharding(mesh, PartitionSpec())
        options = xla_options.of_chip(config.train, mesh)
        _jitted[key] = jax.jit(make_eval_step(config, loss_fn), out_shardings=out, compiler_options=options)
    return _jitted[key]
