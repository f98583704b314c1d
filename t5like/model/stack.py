"""`Stack`: the layers of an encoder or a decoder, a repeated pattern of blocks.

Layers may differ by their position in the pattern (`layer_configs`): in attention window, rotary base and activation.
A stack keeps the parameters of all layers stacked, with a leading dim Y, whatever the pattern, and whether the layers
are scanned (compile time does not grow with depth) or unrolled (faster on a CPU): one layout in memory, on disk and in
optimizers. Scanning and recomputation are plain `jax.lax.scan` and `jax.checkpoint` over a pure function of one
layer's parameters. Called by `transformer`; `generate` unstacks layers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import reduce
from operator import itemgetter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t5like.config.model_schema import ModelConfig, RotaryConfig
from t5like.model import intermediates
from t5like.model.attention_plan import FUSED, AttentionPlan, plan_attention
from t5like.model.block import Block, LayerInputs, LayerOutput
from t5like.model.cache import Cache, Caches, KeyValues, cache_length
from t5like.model.layer_parameters import initialized
from t5like.model.layers import Norm
from t5like.model.masks import MaskSpec
from t5like.model.merged_attention import joint_mask
from t5like.model.positions import bias_module
from t5like.sharding.logical_axes import constrain
from t5like.types import NO_AUXILIARY, Auxiliary, Tree

REMAT = {  # ModelConfig.remat -> what the forward pass keeps
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # Queries and keys behind their rotation: of all projections, they cost the most to recompute for their memory.
    "qk": jax.checkpoint_policies.save_only_these_names("query", "key"),
}


def layer_configs(config: ModelConfig) -> tuple[ModelConfig, ...]:
    """The config of the block at each position of the pattern: one where all layers are alike."""
    configs = []
    for position in range(config.pattern_length):
        fields = {}
        if config.mlp_pattern:
            fields["mlp"] = config.mlp_pattern[position % len(config.mlp_pattern)]
        if config.layer_pattern:
            local = config.layer_pattern[position % len(config.layer_pattern)] == "local"
            if not local:
                fields["attention_window"] = 0
            elif config.rotary.local_base:
                fields["rotary"] = RotaryConfig(base=config.rotary.local_base)
        configs.append(dataclasses.replace(config, **fields))
    return tuple(configs)


def unstack_layers(layers: Tree) -> tuple[Tree, ...]:
    """The parameters of each layer of a stack, by slices, which are copies; a tuple of layers as it is."""
    if isinstance(layers, tuple):
        return layers
    return tuple(jax.tree.map(itemgetter(y), layers) for y in range(jax.tree.leaves(layers)[0].shape[0]))


class Stack(nn.Module):
    """Y blocks with stacked parameters, the relative bias that they may share, and the norm behind them.

    `config` is `ModelConfig.in_decoder` for a decoder; `cross_dim` is D of the encoder's output, 0 without an encoder.
    """

    config: ModelConfig
    num_layers: int
    causal: bool
    cross_dim: int = 0

    def setup(self) -> None:
        config = self.config
        self.relative_bias = bias_module(config, "shared", causal=self.causal)
        if config.norm_position != "post":
            self.final_norm = Norm(config)
        # `param` alone would trace the initialization at each call: a fifth of the time that tracing a step takes.
        layers = self.get_variable("params", "layers") if self.has_variable("params", "layers") else None
        self.layers = self.param("layers", self._init) if layers is None else nn.meta.unbox(layers)

    @property
    def pattern(self) -> tuple[Block, ...]:
        """The blocks of the pattern, bound to no parameters: they are applied to slices of `layers`."""
        return tuple(
            Block(config, self.cross_dim > 0, self.causal, parent=None) for config in layer_configs(self.config)
        )

    def _init(self, key: jax.Array) -> Tree:
        # Parameters have the same shapes and initializers at every position of the pattern.
        return initialized(self.pattern[0], self.num_layers, self.cross_dim, key)

    def __call__(
        self,
        x_BLD: jax.Array,
        *,
        mask: MaskSpec,
        positions_BL: jax.Array,
        encoded_BSD: jax.Array | None = None,
        cross_mask: MaskSpec = MaskSpec(),  # noqa: B008  (immutable)
        cache: Caches | None = None,
        first_query: jax.Array | int = 0,
        branch_start: int | None = None,
        train: bool = False,
    ) -> LayerOutput:
        """Run all layers and the final norm on [B, L, D].

        Args:
            x_BLD: embeddings.
            mask: of self-attention, without the windows of the layers.
            positions_BL: position of each token in its text.
            encoded_BSD: the encoder's output, if the stack reads one and has no cache.
            cross_mask: of cross-attention.
            cache: with it, the tokens continue a cached text.
            first_query: index of the first token in the cache.
            branch_start: see `AttentionPlan`.
            train: whether to drop out.
        """
        rows, queries = x_BLD.shape[:2]
        keys = queries if cache is None else cache_length(cache)
        cross_keys = 0 if encoded_BSD is None else encoded_BSD.shape[1]
        texts = 1 if encoded_BSD is None else rows // encoded_BSD.shape[0]
        merged = self.config.merged_attention and cross_keys > 0 and texts == 1
        joint = joint_mask(mask, cross_mask, rows, keys, cross_keys) if merged else None
        plan = plan_attention(
            self.config,
            rows,
            queries,
            keys,
            cross_keys,
            texts=texts,
            one_mask=joint is not None,
            cached=cache is not None,
            branch_start=branch_start,
        )
        bias_1NLS = None if self.relative_bias is None else self.relative_bias(plan, first_query)
        if self.is_initializing():  # `_init` has made the layers' parameters, and nothing depends on their values
            return LayerOutput(self._normalize(x_BLD), cache, NO_AUXILIARY)
        if plan.cross_attention not in FUSED:
            cross_mask = MaskSpec(allowed_B1LS=cross_mask.build(queries, cross_keys))
        elif joint is not None:
            mask, cross_mask = joint, None
        inputs = [
            LayerInputs(bias_1NLS, each, positions_BL, encoded_BSD, cross_mask, first_query)
            for each in self._masks(mask, plan, first_query)
        ]
        run = self._scan if self.config.layers == "scan" else self._unroll
        layers = [self._layer(block, each, plan, train=train) for block, each in zip(self.pattern, inputs, strict=True)]
        x_BLD, cache, auxiliary, recorded = run(layers, x_BLD, self._dropout_keys(train=train), cache)
        for name, values in recorded.items():
            self.put_variable(name, "layers", values)
        return LayerOutput(self._normalize(x_BLD), cache, auxiliary)

    def _normalize(self, x_BLD: jax.Array) -> jax.Array:
        return x_BLD if self.config.norm_position == "post" else self.final_norm(x_BLD)

    def _dropout_keys(self, *, train: bool) -> jax.Array | None:
        if not train or self.config.dropout_rate == 0:
            return None
        return jax.random.split(self.make_rng("dropout"), self.num_layers)

    def _is_first(self) -> np.ndarray | None:
        """`LayerInputs.is_first` of each layer."""
        return None if self.config.first_attention_norm else np.arange(self.num_layers) == 0

    def _masks(self, mask: MaskSpec, plan: AttentionPlan, first_query: jax.Array | int) -> list[MaskSpec]:
        """The mask of self-attention at each position of the pattern; as an array, unless the kernel evaluates it."""
        windows, by_window = [config.window(causal=self.causal) for config in layer_configs(self.config)], {}
        for window in dict.fromkeys(windows):
            spec = dataclasses.replace(mask, window=window[0], window_ahead=window[1])
            if plan.self_attention not in FUSED and not plan.by_blocks(spec):
                array = spec.build(plan.queries, plan.keys, first_query, plan.branch_start)
                spec = MaskSpec(allowed_B1LS=array)
            by_window[window] = spec
        return [by_window[window] for window in windows]

    def _layer(self, block: Block, inputs: LayerInputs, plan: AttentionPlan, *, train: bool) -> Callable:
        """A layer as a function: (x, params, dropout key, cache, is_first) -> x, (cache, auxiliary, intermediates)."""
        names = intermediates.requested(self)

        def layer(x_BLD, inputs, params, key, cache, is_first):
            rngs = None if key is None else {"dropout": key}
            options = {"plan": plan, "train": train, "rngs": rngs, "mutable": names or False}
            output = block.apply({"params": params}, x_BLD, inputs._replace(is_first=is_first), cache, **options)
            output, variables = output if names else (output, {})
            recorded = intermediates.returned(self.name, variables)
            return output.x_BLD, (output.cache, output.auxiliary, recorded)

        if self.config.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT[self.config.remat], prevent_cse=self.config.layers == "unroll")
        return lambda x_BLD, *rest: layer(x_BLD, inputs, *rest)

    def _scan(self, layers: Sequence[Callable], x_BLD: jax.Array, keys_Y: jax.Array | None, cache: Cache | None):
        """Scan over groups of layers, each once through the pattern."""
        period = len(layers)
        split = lambda x: x if period == 1 else x.reshape(x.shape[0] // period, period, *x.shape[1:])
        join = lambda x: x if period == 1 else x.reshape(x.shape[0] * period, *x.shape[2:])
        stack = lambda *each: each[0] if period == 1 else jnp.stack(each)

        def group(x_BLD, group_inputs):
            outputs = []
            for position, layer in enumerate(layers):
                layer_inputs = group_inputs if period == 1 else jax.tree.map(itemgetter(position), group_inputs)
                x_BLD, output = layer(x_BLD, *layer_inputs)
                outputs.append(output)
            caches, auxiliaries, recorded = zip(*outputs, strict=True)
            auxiliary = reduce(Auxiliary.merged, auxiliaries)
            return x_BLD, (jax.tree.map(stack, *caches), auxiliary, jax.tree.map(stack, *recorded))

        groups = jax.tree.map(split, (self.layers, keys_Y, cache, self._is_first()))
        x_BLD, (cache, auxiliary, recorded) = jax.lax.scan(group, x_BLD, groups)
        auxiliary = jax.tree.map(lambda x: x.sum(0), auxiliary)
        return x_BLD, jax.tree.map(join, cache), auxiliary, jax.tree.map(join, recorded)

    def _unroll(
        self, layers: Sequence[Callable], x_BLD: jax.Array, keys_Y: jax.Array | None, cache: tuple[Cache, ...] | None
    ):
        """Run the layers one after another."""
        params, is_first_Y, outputs = unstack_layers(self.layers), self._is_first(), []
        for y in range(self.num_layers):
            key = None if keys_Y is None else keys_Y[y]
            is_first = None if is_first_Y is None else is_first_Y[y]
            with jax.named_scope(f"layer_{y}"):
                x_BLD, output = layers[y % len(layers)](x_BLD, params[y], key, cache and cache[y], is_first)
            outputs.append(output)
        caches, auxiliaries, recorded = zip(*outputs, strict=True)
        recorded = jax.tree.map(lambda *each: jnp.stack(each), *recorded)
        return x_BLD, cache and caches, reduce(Auxiliary.merged, auxiliaries), recorded

    def prepare_cache(self, rows: int, length: int, encoded_BSD: jax.Array | None) -> Caches:
        """An empty cache for `length` tokens, with the keys and values of the encoder's output."""
        config, block = self.config, self.pattern[0]  # cross-attention is the same at every position of the pattern
        shape = (rows, config.kv_heads, length, config.head_dim)
        zeros = constrain(jnp.zeros(shape, config.dtype), "batch", "act_heads", None, None)

        def layer(params):
            cross = None
            if encoded_BSD is not None:
                cross = block.apply({"params": params}, encoded_BSD, method="keys_values")
            return Cache(KeyValues(zeros, zeros), cross)

        if config.layers == "scan":
            return jax.lax.map(layer, self.layers)
        return tuple(layer(params) for params in unstack_layers(self.layers))
