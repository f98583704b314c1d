"""The evaluation step: sums of the metrics of `step`'s losses, without gradients and dropout. `heldout` calls it."""

import dataclasses
from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5like.config.schema import Config, TrainConfig
from t5like.optim.step import LossFn, pretrain_loss, split_microbatches
from t5like.sharding import xla_options
from t5like.types import Batch, Metrics, Tree, add_metrics

MOST_PROGRAMS = 8  # that are kept


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
    leaves, structure = jax.tree.flatten((params, batch))
    shapes = _metric_shapes(_shared(config), loss_fn, structure, tuple((x.shape, np.dtype(x.dtype)) for x in leaves))
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


@lru_cache(maxsize=MOST_PROGRAMS)
def _metric_shapes(config: Config, loss_fn: LossFn, structure: jax.tree_util.PyTreeDef, types: tuple) -> Metrics:
    """Those of the loss's metrics, from (shape, dtype) of each leaf of parameters and batch."""
    arguments = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*kind) for kind in types])  # without shardings
    return jax.eval_shape(lambda params, batch: loss_fn(config, params, batch, None).metrics, *arguments)


def jit_eval_step(config: Config, mesh: Mesh, loss_fn: LossFn = pretrain_loss):
    """The jitted evaluation step; parameters and batch keep the shardings of the arguments.

    A process that evaluates several runs, which differ in their optimizer, steps or texts only, compiles it once.
    """
    return _program(_shared(config), mesh, loss_fn)


@lru_cache(maxsize=MOST_PROGRAMS)
def _program(config: Config, mesh: Mesh, loss_fn: LossFn):
    out, options = NamedSharding(mesh, PartitionSpec()), xla_options.of_chip(config.train, mesh)
    return jax.jit(make_eval_step(config, loss_fn), out_shardings=out, compiler_options=options)


def _shared(config: Config) -> Config:
    """What an evaluation depends on; the other fields have their defaults, or no text."""
    without = {name: getattr(Config(), name) for name in ("seed", "optimizer", "init_from", "evaluate", "metrics")}
    data, tokenizer = config.data, dataclasses.replace(config.tokenizer, path="")
    without["data"] = dataclasses.replace(data, source=("",) * len(data.source), source_names=(), cache_directory="")
    steps = {name: getattr(config.train, name) for name in ("microbatches", "z_loss", "label_smoothing", "loss_chunk")}
    train = TrainConfig(**steps, compiler_options=config.train.compiler_options)
    return dataclasses.replace(config, **without, tokenizer=tokenizer, train=train)
