"""The head of an encoder that predicts labels: of a text (classification, regression) or of each token.

As in BERT (Devlin et al. 2019, section 4.1, and its released code): of a text, a dense layer with tanh on the first
token, dropout, and the classes; of a token, dropout and the classes. With `model.pooling=mean` that dense layer reads
the mean over the text instead.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5like.config.model_schema import ModelConfig
from t5like.model.layers import Dense, dropout
from t5like.sharding.logical_axes import constrain


class LabelHead(nn.Module):
    """Logits of labels, or the number of a regression, in float32.

    Attributes:
        outputs: C, the number of labels, or 1.
        of_texts: whether the output at a position is that of its text; otherwise that of its token.
    """

    config: ModelConfig
    outputs: int
    of_texts: bool

    @nn.compact
    def __call__(self, x_BSD: jax.Array, segments_BS: jax.Array | None, *, train: bool) -> jax.Array:
        """The encoder's output and the text of each position (`Batch.encoder_segments_BS`) -> float32 [B, S, C].

        The output of a text is read at its first position: with `model.pooling=first`, those at others have no meaning.
        """
        if self.of_texts:
            if self.config.pooling == "mean":
                x_BSD = mean_of_texts(x_BSD, segments_BS).astype(x_BSD.dtype)
            pooler = Dense(self.config, self.config.model_dim, ("embed", "features"), name="pooler")
            x_BSD = constrain(jnp.tanh(pooler(x_BSD)), "batch", "length", "act_embed")
        x_BSD = dropout(self, x_BSD, self.config.dropout_rate, train=train)
        classes = dataclasses.replace(self.config, dtype="float32", biases=True)
        return Dense(classes, self.outputs, ("embed", "classes"), name="classes")(x_BSD.astype(jnp.float32))


def mean_of_texts(x_BSD: jax.Array, segments_BS: jax.Array | None) -> jax.Array:
    """At each position the mean over the tokens of its text, special tokens included: float32 [B, S, D].

    Args:
        x_BSD: any float.
        segments_BS: int32, the text of each position, 0 for padding, where the result is 0; None: each row is one text.
    """
    if segments_BS is None:
        return jnp.broadcast_to(x_BSD.astype(jnp.float32).mean(1, keepdims=True), x_BSD.shape)
    same_BST = (segments_BS[:, :, None] == segments_BS[:, None]) & (segments_BS > 0)[:, None]
    sums_BSD = jnp.einsum("BST,BTD->BSD", same_BST.astype(x_BSD.dtype), x_BSD, preferred_element_type=jnp.float32)
    return sums_BSD / jnp.maximum(same_BST.sum(-1, keepdims=True), 1)
