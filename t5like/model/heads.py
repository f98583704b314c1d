"""Token embeddings and output heads: vocabulary logits, MLM transform, sentence-pair classifier."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5like.config.model_schema import ModelConfig
from t5like.model.layers import Dense, Norm, normal, parameter
from t5like.model.mlp import ACTIVATIONS
from t5like.sharding.logical_axes import constrain


class MlmTransform(nn.Module):
    """The transform of BERT's masked-language-model head before the vocabulary: norm(act(dense(x))), D -> D.

    Activation and norm are those of the layers, as in BERT's released code.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        dense = Dense(self.config, self.config.model_dim, ("embed", "features"), name="dense")
        y_BLD = Norm(self.config, name="norm")(ACTIVATIONS[self.config.mlp](dense(x_BLD)))
        return constrain(y_BLD, "batch", "length", "act_embed")


class PairClassifier(nn.Module):
    """BERT's pooler and next-sentence classifier: classes(tanh(pooler(first token))), with classes in float32.

    Classes as in BERT's released code: 0, the second text follows the first; 1, it does not.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        """The output of the encoder [B, S, D] -> float32 logits [B, 2]."""
        pooler = Dense(self.config, self.config.model_dim, ("embed", "features"), name="pooler")
        float32 = dataclasses.replace(self.config, dtype="float32")
        classes = Dense(float32, 2, ("embed", "classes"), name="classes")
        return classes(jnp.tanh(pooler(x_BSD[:, 0])).astype(jnp.float32))


class ScalarHead(nn.Module):
    """A number for each position, x w + b in float32: PPO's value, or the score of a reward model."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        """The output of the last stack [B, L, D] -> float32 [B, L]."""
        size = self.config.model_dim
        weights_D = parameter(self, "kernel", normal(size**-0.5, ("embed",)), (size,))
        bias = parameter(self, "bias", normal(0.0, ()), ())
        return x_BLD.astype(jnp.float32) @ weights_D + bias


def embed(table_VD: jax.Array, ids: jax.Array, dtype: str) -> jax.Array:
    """Rows of the table [V, D] for any shape of ids.

    The table is cast before the look-up, so that fewer bytes are read. With fsdp its columns are gathered before the
    look-up, because the compiler would otherwise gather the (larger) result.
    """
    return jnp.take(constrain(table_VD.astype(dtype), "vocab", None), ids, axis=0)


@jax.custom_vjp
def project_to_vocabulary(x_BLD: jax.Array, kernel_DV: jax.Array) -> jax.Array:
    """Float32 logits from operands of any dtype; the backward matmuls run in the operands' dtype.

    Plain autodiff would multiply the float32 gradient of the logits by bfloat16 operands, at float32's cost.
    """
    return jnp.einsum("BLD,DV->BLV", x_BLD, kernel_DV, preferred_element_type=jnp.float32)


def _vocabulary_forward(x_BLD, kernel_DV):
    return project_to_vocabulary(x_BLD, kernel_DV), (x_BLD, kernel_DV)


def _vocabulary_backward(saved, gradient_BLV):
    x_BLD, kernel_DV = saved
    gradient_BLV = gradient_BLV.astype(x_BLD.dtype)
    return jnp.einsum("BLV,DV->BLD", gradient_BLV, kernel_DV), jnp.einsum("BLD,BLV->DV", x_BLD, gradient_BLV)


project_to_vocabulary.defvjp(_vocabulary_forward, _vocabulary_backward)
