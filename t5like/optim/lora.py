"""Which parameters of a LoRA run are trained, and how its other ones are stored: pure functions of trees.

A run with `lora.rank` has two trees: `TrainState.params`, adapters and what `lora.trained` names, in float32, and
`TrainState.base`, the weights of `init_from.checkpoint`, in `lora.base_dtype`. Gradients, optimizer state and
checkpoints are of the first tree. `tree.merged` makes the model's parameters of both.

Called by `train_state`, by `checkpoint.base_weights`, which reads the base, and by exports (`merge`).
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from t5like import tree
from t5like.config.lora_schema import LoRAConfig
from t5like.errors import ConfigError
from t5like.model.adapters import Adapter, dequantized, quantized
from t5like.model.layers import Parameter
from t5like.optim.new_parameters import NEW_HEADS
from t5like.types import Array, Tree

# Last parts of the names of the parameters that `lora.base_dtype` is about.
MATRICES = ("kernel", "embedding", "decoder_embedding", "head", "positions")
FACTORS = "kernel_scale"  # beside an int8 kernel


def is_trained(lora: LoRAConfig, name: str) -> bool:
    """Whether a parameter is trained, as new heads are; `name` may be that of an adapter without ``/a`` and ``/b``."""
    return not lora.rank or "lora" in name.split("/") or tree.matches(name, (*lora.trained, *NEW_HEADS))


def with_adapters(lora: LoRAConfig, boxes: Tree, key: jax.Array) -> Tree:
    """Boxes of a model's parameters with those of adapters, in the dtypes of a LoRA run; without LoRA as they are.

    A is drawn with the variance of Kaiming's uniform distribution as in the authors' code and in PEFT, 1 / (3 inputs),
    by a key of its name; B is 0.

    Raises:
        ConfigError: a pattern of `lora.targets` matches no kernel of a layer, or one of `lora.trained` no parameter,
            or `lora.trained` leaves no kernel for an adapter.
    """
    if not lora.rank:
        return boxes
    named = leaves(boxes)
    kernels = [name for name, box in named.items() if _is_kernel(name) and box.names[0] == "layers"]
    tree.mask(dict.fromkeys(kernels, 0), lora.targets, field="lora.targets")
    tree.mask(dict.fromkeys(named, 0), lora.trained, field="lora.trained")
    adapted = {name for name in kernels if tree.matches(name, lora.targets) and not is_trained(lora, name)}
    if not adapted:
        raise ConfigError(
            f"lora.trained={lora.trained!r} contains all kernels of lora.targets={lora.targets!r}, so that there is no "
            "adapter; leave a kernel out, or use lora.rank=0"
        )
    made = {}
    for name, box in named.items():
        if name in adapted:
            made[name.removesuffix("kernel") + "lora"] = _adapter(lora, name, box, key)
        made |= _stored_boxes(lora, name, box)
    return tree.nested(made)


def _adapter(lora: LoRAConfig, name: str, box: Parameter, key: jax.Array) -> Adapter:
    layers, inputs, outputs = box.value.shape
    keys = jax.random.split(jax.random.fold_in(key, zlib.crc32(name.encode())), layers)
    a, b = jnp.zeros((layers, inputs, lora.rank)), jnp.zeros((layers, lora.rank, outputs))
    std = (3 * inputs) ** -0.5
    return Adapter(
        Parameter(a, (*box.names[:2], None), std=std, key=keys),
        Parameter(b, (box.names[0], None, box.names[2])),
        lora.scale,
    )


def _stored_boxes(lora: LoRAConfig, name: str, box: Parameter) -> dict[str, Parameter]:
    """The boxes of a parameter as the run stores it."""
    if is_trained(lora, name):
        return {name: box}
    cast = _storage(lora, name)
    arrays = cast(name, box.value)
    axes = {name: box.names, f"{name}_scale": (*box.names[:-2], box.names[-1])}
    return {each: box.replace(value=x, names=axes[each]) for each, x in arrays.items()}


def _storage(lora: LoRAConfig, name: str) -> Callable[[str, Array], dict[str, Array]]:
    """The function of a base parameter's name and float32 values -> arrays by name, as they are stored."""
    if lora.base_dtype == "float32" or name.rpartition("/")[2] not in MATRICES:
        return lambda name, x: {name: x}
    if lora.base_dtype == "int8" and "/layers/" in name and _is_kernel(name):
        return lambda name, x: dict(zip((name, f"{name}_scale"), quantized(x), strict=True))
    return lambda name, x: {name: x.astype(jnp.bfloat16)}


def stored(lora: LoRAConfig, name: str, x: Array, shardings: Mapping[str, NamedSharding]) -> dict[str, Array]:
    """A base parameter in the dtype of the run, with the shardings of the run: arrays by name.

    Args:
        lora: of the run.
        name: of the parameter.
        x: its float32 values; donated.
        shardings: of the leaves of `TrainState.base` by name.
    """
    cast = _storage(lora, name)
    out = {each: shardings[each] for each in jax.eval_shape(lambda x: cast(name, x), x)}
    return jax.jit(lambda x: cast(name, x), out_shardings=out, donate_argnums=0)(x)


def base_names(base: Tree) -> list[str]:
    """The names of the base's parameters, without those of factors: those of the checkpoint that it is read from."""
    return [name for name in tree.flatten(base) if name.rpartition("/")[2] != FACTORS]


def split(lora: LoRAConfig, params: Tree) -> tuple[Tree, Tree | None]:
    """The trained parameters and the base of a model's; without LoRA all parameters, and None."""
    if not lora.rank:
        return params, None
    named = leaves(params)
    parts = [
        {name: leaf for name, leaf in named.items() if is_trained(lora, name) == trained} for trained in (True, False)
    ]
    return tree.nested(parts[0]), tree.nested(parts[1])


def merge(params: Tree) -> Tree:
    """The parameters of a plain model that computes the same: adapters added to their kernels, everything float32."""
    named = leaves(params)
    merged = {}
    for name, leaf in named.items():
        prefix, _, last = name.rpartition("/")
        if last in ("lora", FACTORS):
            continue
        factors, adapter = named.get(f"{name}_scale"), named.get(f"{prefix}/lora") if last == "kernel" else None
        merged[name] = _merged(leaf, factors, adapter)
    return tree.nested(merged)


@jax.jit
def _merged(leaf: Array, factors: Array | None, adapter: Adapter | None) -> jax.Array:
    x = leaf.astype(jnp.float32) if factors is None else dequantized(leaf, factors)
    return x if adapter is None else x + adapter.delta()


def _is_kernel(name: str) -> bool:
    return name.endswith("/kernel")


def leaves(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What nested dicts contain by name; an adapter is one of them."""
    found = {}
    for key, child in params.items():
        found |= leaves(child, f"{prefix}{key}/") if isinstance(child, Mapping) else {f"{prefix}{key}": child}
    return found
