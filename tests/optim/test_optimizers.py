"""Optimizers against the papers' equations in float64; masks; stacked layers and experts."""

import math
from collections.abc import Callable

import jax
import numpy as np
import optax
import pytest

from t5like import tree
from t5like.config.schema import Config, OptimizerConfig
from t5like.errors import ConfigError
from t5like.optim.optimizers import make_optimizer

NAMES = ("adafactor", "adamw", "adamw_rms", "stable_adamw", "lion", "muon")
RATE = 0.01
KERNEL = "encoder/layers/mlp/in/kernel"


def config_of(name: str, **changes) -> Config:
    changes = {"schedule": "constant", "warmup_steps": 0, "learning_rate": RATE, "clip_norm": 0.0} | changes
    return Config(optimizer=OptimizerConfig(name=name, **changes))


def random_params(num_layers: int = 3) -> dict:
    """Layers that differ in size, so that mixing them up would show; the third's RMS is below Adafactor's least."""
    rng = np.random.default_rng(0)
    sizes = 100.0 ** -np.arange(num_layers)

    def stacked(*shape: int) -> np.ndarray:
        return np.float32(rng.normal(size=(num_layers, *shape)) * sizes.reshape(-1, *[1] * len(shape)))

    return {
        "embedding": np.float32(rng.normal(size=(160, 130))),
        "encoder": {
            "layers": {
                "mlp": {"in": {"kernel": stacked(130, 140), "bias": stacked(140)}, "norm": {"scale": stacked(130)}},
            },
            "relative_bias": np.float32(rng.normal(size=(32, 4))),
        },
    }


def axes_of(params: dict) -> dict[str, tuple[str, ...]]:
    """Logical axes as the model gives them: a stack's parameters begin with ``layers``."""
    tables = {"embedding": ("vocab", "embed"), "encoder/relative_bias": ("buckets", "heads")}

    def axes(name: str, ndim: int) -> tuple[str, ...]:
        return tables.get(name) or ("layers", *(("embed", "mlp") if ndim == 3 else ("norm",)))

    return {name: axes(name, leaf.ndim) for name, leaf in tree.flatten(params).items()}


def random_grads(params: dict, step: int) -> dict:
    rng = np.random.default_rng(100 + step)
    return jax.tree.map(lambda p: p * np.float32(rng.normal(size=p.shape)), params)


def program_of(config: Config, params: dict) -> Callable[[dict, list[dict]], list[dict]]:
    """One program that gives the updates from a list of gradients by name, parameters moving along, as float64."""
    optimizer = make_optimizer(config, params, axes_of(params))

    @jax.jit
    def run(params, grads):
        def update(carry, gradient):
            params, state = carry
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), updates

        return jax.lax.scan(update, (params, optimizer.init(params)), grads)[1]

    def updates(params: dict, grads: list[dict]) -> list[dict]:
        found = tree.flatten(run(params, jax.tree.map(lambda *each: np.stack(each), *grads)))
        return [{name: np.float64(leaf[step]) for name, leaf in found.items()} for step in range(len(grads))]

    return updates


def updates_of(config: Config, params: dict, grads: list[dict] | None = None) -> list[dict]:
    """Those of 3 random gradients, or of others."""
    return program_of(config, params)(params, grads or [random_grads(params, step) for step in range(3)])


def rms(x: np.ndarray) -> float:
    return math.sqrt(np.mean(x**2))


class Adafactor64:
    """Algorithms 4 and 5 of Shazeer and Stern, for one matrix or vector, line by line."""

    def __init__(self, shape: tuple[int, ...]):
        self.factored, self.t = len(shape) == 2 and min(shape) >= 128, 0
        self.row, self.col, self.v = 0.0, 0.0, 0.0

    def __call__(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        self.t += 1
        beta2 = 1 - self.t**-0.8
        if self.factored:
            self.row = beta2 * self.row + (1 - beta2) * (g**2 + 1e-30) @ np.ones(g.shape[1])
            self.col = beta2 * self.col + (1 - beta2) * np.ones(g.shape[0]) @ (g**2 + 1e-30)
            v = np.outer(self.row, self.col) / self.row.sum()
        else:
            v = self.v = beta2 * self.v + (1 - beta2) * (g**2 + 1e-30)
        u = g / np.sqrt(v)
        return -max(1e-3, rms(x)) * RATE * u / max(1, rms(u))


class StableAdamW64:
    """Algorithm 2 of Wortsman et al., line by line: moments with corrected decay rates, and a clipped learning rate."""

    def __init__(self):
        self.t, self.m, self.v = 0, 0.0, 0.0

    def __call__(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        self.t += 1
        b1, b2 = (b * (1 - b ** (self.t - 1)) / (1 - b**self.t) for b in (0.9, 0.999))
        self.m, self.v = b1 * self.m + (1 - b1) * g, b2 * self.v + (1 - b2) * g**2
        rate = RATE / max(1, rms(g / np.sqrt(np.maximum(self.v, 1e-16))))
        return -rate * DECAY * x - rate * self.m / (np.sqrt(self.v) + 1e-8)


class AdamW64:
    def __init__(self, scaled: bool):
        self.scaled, self.t, self.m, self.v = scaled, 0, 0.0, 0.0

    def __call__(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        self.t += 1
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g**2
        step = self.m / (1 - 0.9**self.t) / (np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8)
        return -RATE * step * (max(1e-3, rms(x)) if self.scaled else 1)


class Lion64:
    m = 0.0

    def __call__(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        step = np.sign(0.9 * self.m + 0.1 * g)
        self.m = 0.999 * self.m + 0.001 * g
        return -RATE * step


REFERENCES = {
    "adafactor": Adafactor64,
    "adamw": lambda _: AdamW64(scaled=False),
    "adamw_rms": lambda _: AdamW64(scaled=True),
    "stable_adamw": lambda _: StableAdamW64(),
    "lion": lambda _: Lion64(),
}
DECAY = 0.3  # of StableAdamW, which clips it


@pytest.mark.parametrize("name", REFERENCES)
def test_updates_follow_the_papers_equations_layer_by_layer(name):
    params = random_params()
    decay = {"weight_decay": DECAY, "no_decay": ()} if name == "stable_adamw" else {}
    grads = [jax.tree.map(lambda g: g * 3.0**step, random_grads(params, step)) for step in range(3)]  # noqa: B023
    found = updates_of(config_of(name, **decay), params, grads)
    for leaf_name, leaf in tree.flatten(params).items():
        matrices = list(leaf) if "layers" in leaf_name else [leaf]
        for layer, x in enumerate(np.float64(m) for m in matrices):
            reference = REFERENCES[name](x.shape)
            for step in range(3):
                g = np.float64(tree.flatten(grads[step])[leaf_name])
                update = reference(g[layer] if "layers" in leaf_name else g, x)
                x = x + update
                ours = found[step][leaf_name]
                np.testing.assert_allclose(ours[layer] if "layers" in leaf_name else ours, update, rtol=3e-4, atol=1e-7)


def test_muon_steps_are_orthogonal_with_the_size_of_adamw_and_follow_the_nesterov_momentum():
    params = random_params()
    found = updates_of(config_of("muon"), params)
    gradients = [np.float64(tree.flatten(random_grads(params, step))[KERNEL]) for step in range(2)]
    for layer in range(3):
        m1 = 0.05 * gradients[0][layer]
        m2 = 0.95 * m1 + 0.05 * gradients[1][layer]
        # Nesterov with bias correction (Dozat 2016): the second step looks ahead to the third
        momenta = m1, 0.95 * m2 / (1 - 0.95**3) + 0.05 * gradients[1][layer] / (1 - 0.95**2)
        for momentum, update in zip(momenta, found, strict=False):
            u, _, v = np.linalg.svd(momentum, full_matrices=False)
            step = -update[KERNEL][layer] / RATE / (0.2 * math.sqrt(140))
            in_basis = u.T @ step @ v.T  # the identity, were the orthogonalisation exact; its authors get 0.7 to 1.2
            singular = np.diag(in_basis)
            np.testing.assert_allclose(in_basis - np.diag(singular), 0, atol=1e-3)
            assert singular.max() < 1.25 and np.quantile(singular, 0.1) > 0.65
        assert rms(found[0][KERNEL][layer]) / RATE == pytest.approx(0.2, rel=0.2)


def test_muon_leaves_embeddings_tables_and_vectors_to_adam_with_a_factor_of_its_own():
    params = random_params()
    muon, faster, adam = (
        updates_of(config_of(name, weight_decay=0.1, adam_factor=factor), params, [random_grads(params, 0)])[0]
        for name, factor in (("muon", 1), ("muon", 4), ("adamw", 9))
    )
    for name in muon:
        assert np.array_equal(muon[name], adam[name]) == (name != KERNEL)
        wanted = muon[name] * (1 if name == KERNEL else 4)
        np.testing.assert_allclose(faster[name], wanted, rtol=1e-5, atol=1e-6 * RATE, err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_a_stack_of_layers_is_updated_like_separate_layers(name):
    params = {"encoder": {"layers": random_params()["encoder"]["layers"]}}
    grads = [random_grads(params, step) for step in range(3)]
    config = config_of(name, weight_decay=0.1)
    together = updates_of(config, params, grads)
    layer_of = lambda layer, each: jax.tree.map(lambda leaf: leaf[layer : layer + 1], each)
    alone = program_of(config, layer_of(0, params))
    for layer in range(3):
        own, *own_grads = (layer_of(layer, each) for each in (params, *grads))
        for step, update in enumerate(alone(own, own_grads)):
            for leaf, value in update.items():
                np.testing.assert_allclose(together[step][leaf][layer], value[0], rtol=1e-5, atol=1e-7)


def test_adafactor_never_factors_over_the_layers():
    params = {
        "decoder": {
            "layers": {
                "kernel": np.ones((256, 128, 4)),
                "norm": {"scale": np.ones((256, 128))},
                "mlp": {"kernel": np.ones((256, 128, 130))},
            }
        }
    }
    state = jax.eval_shape(make_optimizer(config_of("adafactor", no_decay=()), params, axes_of(params)).init, params)
    shapes = {name.partition("layers/")[2]: leaf.shape for name, leaf in tree.flatten(state).items() if leaf.ndim}
    assert shapes == {
        "kernel": (256, 128, 4),
        "norm/scale": (256, 128),
        "mlp/kernel/row": (256, 128),
        "mlp/kernel/col": (256, 130),
    }


def test_expert_kernels_are_factored_and_stacked_biases_are_not():
    params = {"kernel": np.ones((2, 3, 128, 130)), "bias": np.ones((256, 128))}
    axes = {"kernel": ("layers", "experts", "embed", "mlp"), "bias": ("layers", "mlp")}
    state = jax.eval_shape(make_optimizer(config_of("adafactor", no_decay=()), params, axes).init, params)
    shapes = {name.partition("moments/")[2]: leaf.shape for name, leaf in tree.flatten(state).items() if leaf.ndim}
    assert shapes == {"kernel/row": (2, 3, 128), "kernel/col": (2, 3, 130), "bias": (256, 128)}


@pytest.mark.parametrize("name", NAMES)
def test_every_expert_is_updated_as_if_its_kernel_were_a_layer_of_its_own(name):
    rng = np.random.default_rng(0)
    kernel, grad = (np.float32(rng.normal(size=(2, 3, 128, 130))) for _ in range(2))
    config = config_of(name, no_decay=())

    def update(*axes: str):
        reshape = lambda leaf: {"kernel": leaf if "experts" in axes else leaf.reshape(6, 128, 130)}
        optimizer = make_optimizer(config, params := reshape(kernel), {"kernel": axes})
        updates, _ = jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p))(params, reshape(grad))
        return updates["kernel"].reshape(6, 128, 130)

    by_expert, by_layer = update("layers", "experts", "embed", "mlp"), update("layers", "embed", "mlp")
    np.testing.assert_allclose(by_expert, by_layer, rtol=1e-6)
    if name == "muon":
        assert np.sqrt(np.mean(np.float64(by_expert) ** 2, (1, 2))) / RATE == pytest.approx(0.2, rel=0.2)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_keep_their_bits_and_have_no_state(name):
    params = random_params()
    config = config_of(name, weight_decay=0.1, clip_norm=1.0, frozen=("embedding", ".*/mlp/in/.*"))
    updates = updates_of(config, params)[-1]
    for leaf, value in updates.items():
        assert (not value.any()) == (leaf == "embedding" or "/in/" in leaf), leaf
    state = jax.eval_shape(make_optimizer(config, params, axes_of(params)).init, params)
    assert not [n for n in tree.flatten(state) if "embedding" in n or "/in/" in n]
    assert [n for n in tree.flatten(state) if "relative_bias" in n]


def test_frozen_parameters_do_not_count_in_the_clipped_norm():
    params = random_params()
    grads = [jax.tree.map(lambda p: 1e6 * np.ones_like(p), params) | {"encoder": random_grads(params, 0)["encoder"]}]
    norm = math.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(grads[0]["encoder"])))
    config = config_of("adamw", b1=0.0, b2=0.0, epsilon=1e9, clip_norm=1.0, frozen=("embedding",))  # g / 1e9
    update = updates_of(config, params, grads)[0]["encoder/relative_bias"]
    np.testing.assert_allclose(update, -RATE / 1e9 / norm * np.float64(grads[0]["encoder"]["relative_bias"]), rtol=1e-4)


def test_weight_decay_subtracts_rate_times_decay_except_from_the_parameters_of_no_decay():
    params = random_params()
    plain, decayed = (updates_of(config_of("lion", weight_decay=w), params)[0] for w in (0.0, 0.5))
    for name, leaf in tree.flatten(params).items():
        spared = "scale" in name or "bias" in name
        wanted = 0 if spared else -RATE * 0.5 * np.float64(leaf)
        np.testing.assert_allclose(decayed[name] - plain[name], wanted, atol=1e-8)


@pytest.mark.parametrize(
    ("field", "pattern", "part"),
    [
        ("no_decay", "sclae", "matches no parameter"),
        ("frozen", "encoder/(.*", "not a regular expression"),
        ("frozen", ".*", "must leave a parameter"),
    ],
)
def test_a_pattern_that_matches_no_parameter_or_freezes_all_is_refused(field, pattern, part):
    with pytest.raises(ConfigError, match=rf"optimizer\.{field}=.*{part}"):
        make_optimizer(config_of("adamw", **{field: (pattern,)}), params := random_params(), axes_of(params))


@pytest.mark.parametrize("name", NAMES)
def test_sharded_donated_and_planned_updates_equal_the_plain_ones(name):
    layers = {
        "in": {"kernel": random_params(2)["encoder"]["layers"]["mlp"]["in"]["kernel"][:, :128, :128]},
        "norm": {"scale": np.ones((2, 128), np.float32)},
    }
    params = {"decoder": {"layers": layers}}
    config = config_of(name, weight_decay=0.1, clip_norm=1.0)
    grads = [random_grads(params, step) for step in range(2)]
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = {3: jax.P(None, "fsdp", "tensor"), 2: jax.P(None, "fsdp")}

    def shard(values: dict) -> dict:
        return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.NamedSharding(mesh, spec[leaf.ndim])), values)

    optimizer = make_optimizer(config, jax.eval_shape(lambda: params), axes_of(params))  # from shapes alone
    placed = shard(params)
    state = optimizer.init(placed)
    update = jax.jit(optimizer.update, donate_argnums=1)
    for plain, gradient in zip(updates_of(config, params, grads), grads, strict=True):
        updates, state = update(shard(gradient), state, placed)
        placed = jax.jit(optax.apply_updates)(placed, updates)
        for leaf, value in tree.flatten(updates).items():
            np.testing.assert_allclose(value, plain[leaf], rtol=1e-4, atol=1e-7)
