"""Cross entropy against float64 formulas, and its chunks against the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5like.optim import losses


def example(rng, rows=3, length=10, vocab=17):
    logits = rng.normal(size=(rows, length, vocab)) * 3
    return logits, rng.integers(0, vocab, (rows, length)), rng.integers(0, 2, (rows, length)).astype(np.float32)


def reference(logits, targets, weights, z_loss, smoothing):
    """T5X's compute_weighted_cross_entropy (t5x/losses.py), written out in float64: its objective, and plain nats."""
    log_z = np.log(np.exp(logits).sum(-1))
    log_p, vocab = logits - log_z[..., None], logits.shape[-1]
    confidence, low_confidence = 1.0 - smoothing, smoothing / (vocab - 1)
    soft_targets = np.where(np.arange(vocab) == targets[..., None], confidence, low_confidence)
    constant = -(confidence * np.log(confidence) + (vocab - 1) * low_confidence * np.log(low_confidence + 1e-20))
    smooth = -(soft_targets * log_p).sum(-1) - constant
    nats = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    return (weights * (smooth + z_loss * log_z**2)).sum(), (weights * nats).sum()


@pytest.mark.parametrize("z_loss, smoothing", [(0, 0), (1e-2, 0), (0, 0.1), (1e-2, 0.4)])
def test_cross_entropy_is_that_of_t5x(rng, z_loss, smoothing):
    logits, targets, weights = example(rng)
    of = functools.partial(losses.cross_entropy, vocab_size=17, z_loss=z_loss, label_smoothing=smoothing)
    loss = jax.jit(of)(np.float32(logits), targets, weights)
    objective, nats = reference(logits, targets, weights, z_loss, smoothing)
    np.testing.assert_allclose(loss.objective, objective, rtol=1e-5)
    np.testing.assert_allclose(loss.metrics["loss"].total, nats, rtol=1e-5)
    assert loss.metrics["loss"].weight == weights.sum()
    accuracy = ((logits.argmax(-1) == targets) * weights).sum()
    assert loss.metrics["accuracy"].total == accuracy


def test_the_gradient_is_that_of_the_formula(rng):
    logits, targets, weights = example(rng, rows=1, length=2, vocab=5)
    weights[:] = [[1.0, 0.5]]
    padded = np.float32(np.concatenate([logits, np.full((1, 2, 3), -1e9)], axis=-1))
    settings = {"vocab_size": 5, "z_loss": 1e-2, "label_smoothing": 0.3}
    gradient = jax.jit(jax.grad(lambda x: losses.cross_entropy(x, targets, weights, **settings).objective))(padded)
    wanted = np.zeros((1, 2, 8))  # by central differences in float64
    for place in np.ndindex(logits.shape):
        step = np.zeros_like(logits)
        step[place] = 1e-5
        high, low = (reference(logits + sign * step, targets, weights, 1e-2, 0.3)[0] for sign in (1, -1))
        wanted[place] = (high - low) / 2e-5
    np.testing.assert_allclose(gradient, wanted, atol=1e-5)


def test_smoothing_has_its_minimum_0_at_the_smoothed_distribution():
    shares = np.full((1, 1, 9), 0.2 / 8)
    shares[..., 4] = 0.8
    of = jax.jit(functools.partial(losses.cross_entropy, vocab_size=9, label_smoothing=0.2))
    loss = of(np.float32(np.log(shares)), np.array([[4]]), np.ones((1, 1), np.float32))
    assert abs(loss.objective) < 1e-6


def test_smoothing_leaves_padding_rows_alone(rng):
    logits, targets, weights = example(rng)
    padded = np.concatenate([logits, np.full((3, 10, 4), -1e9)], axis=-1)
    of = jax.jit(functools.partial(losses.cross_entropy, vocab_size=17, label_smoothing=0.1))
    whole, of_padded = (of(np.float32(x), targets, weights).objective for x in (logits, padded))
    np.testing.assert_allclose(whole, of_padded, rtol=1e-6)


def test_large_logits_stay_finite():
    logits = np.float32([[[1e4, 0.0, -1e4]]])
    of = jax.jit(functools.partial(losses.cross_entropy, vocab_size=3))
    loss = of(logits, np.array([[0]]), np.ones((1, 1), np.float32))
    assert loss.metrics["loss"].total == 0 and jnp.isfinite(loss.objective)


@pytest.mark.parametrize("chunk", [1, 4, 5, 10, 64])
def test_chunks_equal_the_whole_with_their_gradients(rng, chunk):
    hidden, head = np.float32(rng.normal(size=(3, 10, 6))), np.float32(rng.normal(size=(6, 17)))
    _, targets, weights = example(rng)

    def loss(head, hidden, chunk):
        def of(h, t, w):
            return losses.cross_entropy(h @ head, t, w, vocab_size=17, z_loss=1e-2)

        return (
            losses.in_chunks(of, hidden, jnp.asarray(targets), jnp.asarray(weights), chunk)
            if chunk
            else of(hidden, targets, weights)
        )

    def with_gradient(chunk):
        def objective(head, hidden):
            found = loss(head, hidden, chunk)
            return found.objective, found

        return jax.jit(jax.grad(objective, (0, 1), has_aux=True))(head, hidden)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), with_gradient(0), with_gradient(chunk)
    )


def test_next_sentence_is_the_cross_entropy_of_two_classes_and_leaves_rows_out(rng):
    logits = rng.normal(size=(7, 2)) * 3
    follows = np.array([1, 0, -1, 1, -1, 0, 1])
    loss = jax.jit(losses.next_sentence)(np.float32(logits), follows[:, None], row_weight=5.0)
    nats = np.log(np.exp(logits).sum(-1)) - np.where(follows == 1, logits[:, 0], logits[:, 1])  # class 0: it follows
    np.testing.assert_allclose(loss.metrics["nsp_loss"], (nats[follows >= 0].sum(), 5), rtol=1e-5)
    np.testing.assert_allclose(loss.objective, 5 * nats[follows >= 0].sum(), rtol=1e-5)
    right = (logits.argmax(-1) == 1 - follows)[follows >= 0]
    assert loss.metrics["nsp_accuracy"] == (right.sum(), 5)


def test_a_pairs_loss_has_the_gradient_of_its_formula(rng):
    logits, follows = np.float32(rng.normal(size=(4, 2))), np.array([[1], [0], [-1], [0]])
    gradient = jax.jit(jax.grad(lambda x: losses.next_sentence(x, follows, row_weight=3.0).objective))(logits)
    wanted = 3 * (jax.nn.softmax(logits) - np.array([[1, 0], [0, 1], [0, 0], [0, 1]])) * (follows >= 0)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [0, 4])
def test_losses_by_component_are_those_of_its_rows(rng, chunk):
    logits, targets, weights = example(rng, rows=5)
    component = np.array([[2], [0], [2], [3], [0]], np.int32)

    def of(logits, targets, weights):
        return losses.cross_entropy(logits, targets, weights, vocab_size=17, component_B1=component, num_components=4)

    in_chunks = lambda *whole: losses.in_chunks(of, *whole, chunk) if chunk else of(*whole)
    found = jax.jit(in_chunks)(np.float32(logits), targets, weights).metrics["by_component"]
    for index in range(4):
        mine = component[:, 0] == index
        np.testing.assert_allclose(
            found.total[index], reference(logits[mine], targets[mine], weights[mine], 0, 0)[1], rtol=1e-5
        )
        assert found.weight[index] == weights[mine].sum()
