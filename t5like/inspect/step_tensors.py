"""Every tensor of one training step by name, in the order in which the step computes them.

    batch/encoder_BS                            what the step reads
    parameter_before/embedding
    encoder/layers/0/attention_output           forward, without dropout: `intermediates` of each layer,
    decoder/output, logits                      then the output of the last stack, and the logits
    loss                                        the objective's metrics
    gradient/decoder/layers/1/mlp/out/kernel    backward: from the last layer to the first
    update/embedding, parameter/embedding       what the optimizer adds, and the result

The programs are those of the trainer (`optim.step.make_gradient`, the optimizer), on the mesh of the config. The
activations of padding are 0, because nothing depends on them. Called by `compare_steps` and `leaks`; `replay`
also makes a `Step`.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from t5like import tree
from t5like.config.schema import Config
from t5like.model.intermediates import INTERMEDIATES
from t5like.model.transformer import Transformer
from t5like.optim import step
from t5like.optim.layer_statistics import is_stacked, of_layer
from t5like.optim.optimizers import make_optimizer
from t5like.optim.train_state import model_params, parameter_axes
from t5like.types import Array, Batch, TrainState, Tree

# Of a layer, in the order of its computation. Attention weights are left out for their size.
FORWARD = (*(name for name in INTERMEDIATES if not name.endswith("weights") and name != "residual"), "residual")
# Parts of parameter names in the order of the backward pass; parts that are not here come between them.
FIRST_BACKWARD = ("head", "head_bias", "scalar_head", "label_head", "pairs", "mlm", "decoder", "final_norm")
LAST_BACKWARD = ("relative_bias", "encoder", "embedding_norm", "token_types", "positions", "embedding")
IN_LAYER = ("mlp", "mlp_norm", "cross_attention", "cross_attention_norm", "attention", "attention_norm", "out")


class Step(NamedTuple):
    """A step that is about to be made.

    Attributes:
        config: resolved on `mesh`.
        mesh: where `state` is.
        state: before the step.
        batch: on the devices of the mesh: what `loss_fn` takes.
        loss_fn, model_batch: see `optim.step`.
    """

    config: Config
    mesh: jax.sharding.Mesh
    state: TrainState
    batch: Any
    loss_fn: step.LossFn = step.pretrain_loss
    model_batch: step.ModelBatch = step.unchanged


class Programs:
    """The compiled programs of a step; `run` returns its tensors for any parameters."""

    def __init__(self, prepared: Step, *, backward: bool = True):
        """`backward`: whether gradients and updates are computed."""
        self._step, self._backward = prepared, backward
        config, state = prepared.config, prepared.state
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state.params)
        self._forward = jax.jit(lambda params, batch: forward(config, params, prepared.model_batch(batch)))
        gradient = step.make_gradient(config, prepared.loss_fn)
        optimizer = make_optimizer(config, state.params, parameter_axes(config, prepared.model_batch(prepared.batch)))

        def update(state: TrainState, batch: Any) -> tuple[Tree, Tree, Tree, Any]:
            grads, metrics = gradient(state.params, batch, state.step, state.base)
            updates, _ = optimizer.update(grads, state.opt_state, state.params)
            return grads, updates, optax.apply_updates(state.params, updates), metrics

        self._update = jax.jit(update, out_shardings=(shardings, shardings, shardings, None))

    def run(self, params: Tree | None = None, batch: Any = None) -> dict[str, np.ndarray]:
        """The tensors by name, in order, on the host as float32; by default of the step's own parameters and batch."""
        state = self._step.state if params is None else self._step.state._replace(params=params)
        batch = self._step.batch if batch is None else batch
        with jax.set_mesh(self._step.mesh):
            values = _inputs(state, batch)
            values |= _in_order(jax.device_get(self._forward(model_params(state), batch)))
            if self._backward:
                grads, updates, new, metrics = jax.device_get(self._update(state, batch))
                weight = max(float(metrics["loss"].weight), 1e-30)
                values["loss"] = np.float32(metrics["loss"].total / weight)
                values |= dict(sorted(_layers("gradient", grads), key=lambda item: backward_order(item[0])))
                values |= dict([*_layers("update", updates), *_layers("parameter", new)])
        return values

    def moved(self, unit: float, seed: int) -> Tree:
        """The parameters, each multiplied by 1 + unit or 1 - unit at random."""

        def move(key: jax.Array, params: Tree) -> Tree:
            leaves, structure = jax.tree.flatten(params)
            keys = jax.random.split(key, len(leaves))
            signs = [jax.random.bernoulli(k, shape=leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
            moved = [jnp.where(up, x * (1 + unit), x * (1 - unit)) for up, x in zip(signs, leaves, strict=True)]
            return jax.tree.unflatten(structure, moved)

        params = self._step.state.params
        shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
        return jax.jit(move, out_shardings=shardings)(jax.random.key(seed), params)


def forward(config: Config, params: Tree, batch: Batch) -> dict[str, Array]:
    """The values of the forward pass by stack and name, layers stacked; ``output`` and ``logits`` behind them."""
    model = Transformer(config)
    hidden, variables = model.apply({"params": params}, batch, method="hidden", mutable=list(FORWARD))
    if config.data.label_objective:
        arguments = (hidden.x_BLD, batch.encoder_segments_BS)
        logits_BLV = model.apply({"params": params}, *arguments, method="label_logits")
    else:
        logits_BLV = model.apply({"params": params}, hidden.x_BLD, method="logits")
    segments = {"encoder": batch.encoder_segments_BS, "decoder": batch.decoder_segments_BL}
    values = {f"{stack}/layers/{name}": x["layers"] for name in variables for stack, x in variables[name].items()}
    last = "decoder" if config.model.has_decoder else "encoder"
    values |= {f"{last}/output": hidden.x_BLD, "logits": logits_BLV[..., : config.tokenizer.vocab_size]}

    def of_real_positions(name: str, x: Array) -> Array:
        segments_BL = segments[last if name == "logits" else name.partition("/")[0]]
        x = x.astype(jnp.float32)
        return x if segments_BL is None else jnp.where((segments_BL > 0)[..., None], x, 0.0)

    return {name: of_real_positions(name, x) for name, x in values.items()}


def _inputs(state: TrainState, batch: Any) -> dict[str, np.ndarray]:
    rows = {f"batch/{name}": np.asarray(x) for name, x in tree.flatten(batch).items()}
    return rows | dict(_layers("parameter_before", jax.device_get(state.params)))


def _in_order(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Values of `forward`, layer by layer."""
    ordered = {}
    for stack in ("encoder", "decoder"):
        of_stack = {name: values[key] for name in FORWARD if (key := f"{stack}/layers/{name}") in values}
        for layer in range(len(of_stack["residual"]) if of_stack else 0):
            ordered |= {f"{stack}/layers/{layer}/{name}": np.asarray(x[layer]) for name, x in of_stack.items()}
        if f"{stack}/output" in values:
            ordered[f"{stack}/output"] = np.asarray(values[f"{stack}/output"])
    return ordered | {"logits": np.asarray(values["logits"])}


def _layers(kind: str, params: Tree) -> Iterator[tuple[str, np.ndarray]]:
    """Each parameter by name, those of a stack layer by layer."""
    for name, leaf in tree.flatten(params).items():
        if is_stacked(name):
            yield from ((f"{kind}/{of_layer(name, layer)}", np.asarray(x)) for layer, x in enumerate(leaf))
        else:
            yield f"{kind}/{name}", np.asarray(leaf)


def backward_order(name: str) -> list[tuple[int, int]]:
    """A key that sorts the names of gradients as the backward pass makes them: ``gradient/decoder/layers/1/...``."""
    order = (*FIRST_BACKWARD, *IN_LAYER)
    key = []
    for part in name.split("/"):
        if part.isdecimal():
            key.append((1, -int(part)))
        elif part in LAST_BACKWARD:
            key.append((2, LAST_BACKWARD.index(part)))
        else:
            key.append((0, order.index(part)) if part in order else (1, 0))
    return key
