"""Matmuls and attention as XLA:CPU runs them fastest: the same values, with backward passes written by hand.

XLA:CPU has a fast path for matmuls of operands in their own layout, and a slow one for matmuls with a transposition
fused in, which autodiff creates for every weight. Here the smaller operand is transposed separately, behind a barrier
that prevents this fusion. On accelerators it would only cost time: `ModelConfig.kernels` selects the formulation, and
`sharding.auto` chooses it by the mesh's devices. Used by `layers` and `attention`.
"""

from functools import partial

import jax
import jax.numpy as jnp

from t5like.model.kernels.plain import soft_capped
from t5like.types import MASKED


def _transposed(x: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier(x.swapaxes(-1, -2))


def _weight_gradient(x_MD: jax.Array, gradient_MF: jax.Array) -> jax.Array:
    """x.T @ gradient, with the smaller operand transposed."""
    if x_MD.shape[1] <= gradient_MF.shape[1]:
        return _transposed(x_MD) @ gradient_MF
    return jax.lax.optimization_barrier(_transposed(gradient_MF) @ x_MD).T


@jax.custom_vjp
def _matmul_2d(x_MD: jax.Array, kernel_DF: jax.Array) -> jax.Array:
    return x_MD @ kernel_DF


_matmul_2d.defvjp(
    lambda x, kernel: (x @ kernel, (x, kernel)), lambda saved, g: (g @ saved[1].T, _weight_gradient(saved[0], g))
)


def matmul(x: jax.Array, kernel_DF: jax.Array) -> jax.Array:
    """x [..., D] @ kernel, as one matmul of two matrices."""
    return _matmul_2d(x.reshape(-1, x.shape[-1]), kernel_DF).reshape(*x.shape[:-1], kernel_DF.shape[1])


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(
    q_BNLH: jax.Array,
    k_BNSH: jax.Array,
    v_BNSH: jax.Array,
    bias_1NLS: jax.Array | None,
    mask_B1LS: jax.Array | None,
    softcap: float = 0.0,
) -> jax.Array:
    """As `plain.attend`: softmax(q k + bias) v over the keys that the mask allows, q k with a soft cap."""
    return _attend_forward(q_BNLH, k_BNSH, v_BNSH, bias_1NLS, mask_B1LS, softcap)[0]


def _attend_forward(q_BNLH, k_BNSH, v_BNSH, bias_1NLS, mask_B1LS, softcap):
    scores_BNLS, capped_BNLS = jnp.einsum("BNLH,BNSH->BNLS", q_BNLH, k_BNSH), None
    if softcap:
        scores_BNLS = capped_BNLS = soft_capped(scores_BNLS, softcap)
    if bias_1NLS is not None:
        scores_BNLS = scores_BNLS + bias_1NLS
    if mask_B1LS is not None:
        scores_BNLS = jnp.where(mask_B1LS, scores_BNLS, MASKED)
    weights_BNLS = jnp.exp(scores_BNLS - scores_BNLS.max(-1, keepdims=True))
    scale_BNL1 = 1 / weights_BNLS.sum(-1, keepdims=True)  # applied to H columns instead of S
    if mask_B1LS is not None:
        scale_BNL1 = jnp.where(mask_B1LS.any(-1, keepdims=True), scale_BNL1, 0.0)
    out_BNLH = jnp.einsum("BNLS,BNSH->BNLH", weights_BNLS, v_BNSH) * scale_BNL1
    out_BLNH = out_BNLH.transpose(0, 2, 1, 3)  # the output projection's input, which is kept anyway
    saved = (q_BNLH, k_BNSH, v_BNSH, bias_1NLS, capped_BNLS, weights_BNLS, scale_BNL1, out_BLNH)
    return out_BLNH.transpose(0, 2, 1, 3), saved


def _attend_backward(softcap, saved, gradient_BNLH):
    q_BNLH, k_BNSH, v_BNSH, bias_1NLS, capped_BNLS, weights_BNLS, scale_BNL1, out_BLNH = saved
    gradient_BNLH = gradient_BNLH * scale_BNL1
    mean_BNL1 = (gradient_BNLH.transpose(0, 2, 1, 3) * out_BLNH).sum(-1).transpose(0, 2, 1)[..., None]
    d_biased_BNLS = weights_BNLS * (jnp.einsum("BNLH,BNSH->BNLS", gradient_BNLH, v_BNSH) - mean_BNL1)
    d_scores_BNLS = d_biased_BNLS
    if capped_BNLS is not None:
        d_scores_BNLS = d_biased_BNLS * (1 - (capped_BNLS / softcap) ** 2)
    d_q_BNLH = jnp.einsum("BNLS,BNSH->BNLH", d_scores_BNLS, k_BNSH)
    # Scores are transposed, not q and the gradient, although those are smaller: then all rows are contiguous.
    d_k_BNSH = jnp.einsum("BNSL,BNLH->BNSH", _transposed(d_scores_BNLS), q_BNLH)
    d_v_BNSH = jnp.einsum("BNSL,BNLH->BNSH", _transposed(weights_BNLS), gradient_BNLH)
    d_bias_1NLS = None if bias_1NLS is None else _sum_of_rows(d_biased_BNLS)[None]
    return d_q_BNLH, d_k_BNSH, d_v_BNSH, d_bias_1NLS, None


def _sum_of_rows(x_BNLS: jax.Array) -> jax.Array:
    """The sum over the batch, as a matmul: XLA:CPU's reduction of a leading dim reads memory in strides.

    It would also add the gradients of all layers before it sums over rows, and keep them until then.
    """
    return jnp.einsum("B,BNLS->NLS", jnp.ones(x_BNLS.shape[0], x_BNLS.dtype), x_BNLS)


attend.defvjp(_attend_forward, _attend_backward)
