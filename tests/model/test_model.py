"""The model against Hugging Face's, published parameter counts, and truths that hold for every variant."""

import functools
import math
from pathlib import Path

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_batch, small

from t5like import tree
from t5like.config import loader
from t5like.config.schema import Config
from t5like.data import pipeline
from t5like.errors import ConfigError
from t5like.model import positions
from t5like.model.attention import attend
from t5like.model.kernels import tpu_attention, tpu_matmul
from t5like.model.masks import MaskSpec, causal_mask, segment_mask
from t5like.model.transformer import Transformer
from t5like.optim import step
from t5like.sharding import auto, logical_axes
from t5like.sharding import mesh as meshes
from t5like.types import Batch

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "hf_logits.npz")
BERT = {
    "architecture": "encoder",
    "head_dim": 4,
    "mlp": "gelu_exact",
    "positions": "learned",
    "norm": "layer",
    "norm_position": "post",
    "norm_epsilon": 1e-12,
    "embedding_norm": True,
    "token_types": 2,
    "head": "mlm",
    "biases": True,
    "tied_embeddings": True,
    "scale_attention": True,
    "init": "bert",
    "max_length": 64,
}


def init(config: Config, seed: int = 0):
    make = functools.partial(step.init_params, config, random_batch(config))
    return jax.jit(lambda key: nn.meta.unbox(make(key)))(jax.random.key(seed))


@functools.partial(jax.jit, static_argnums=0)
def logits(config: Config, params, batch: Batch):
    return Transformer(config).apply({"params": params}, batch)


@functools.partial(jax.jit, static_argnums=0)
def pair_logits(config: Config, params, batch: Batch):
    return Transformer(config).apply({"params": params}, batch, method=lambda m, batch: m.pair_logits(m.hidden(batch)))


@functools.partial(jax.jit, static_argnums=0)
def mean_loss(config: Config, params, batch: Batch, key=None):
    loss = step.pretrain_loss(config, params, batch, key).metrics["loss"]
    return loss.total / loss.weight


# ---- Hugging Face; its families are in test_families ----


@pytest.mark.parametrize("rows", [5, 128, 384])  # in one go, just one band, several
def test_rows_are_shifted_one_further_each_and_gradients_come_back_along_diagonals(rows):
    columns, rng = 301, np.random.default_rng(0)
    diagonals = rng.normal(size=(2, rows + columns - 1)).astype(np.float32)
    gradient = rng.normal(size=(2, rows, columns)).astype(np.float32)
    out, back = jax.vjp(lambda x: positions.shift_rows(x, rows, columns), diagonals)
    place = np.arange(columns)[None] - np.arange(rows)[:, None] + rows - 1  # [rows, columns], of the diagonals
    np.testing.assert_array_equal(out, diagonals[:, place])
    expected = np.zeros(diagonals.shape)
    np.add.at(expected, (slice(None), place), gradient)
    np.testing.assert_allclose(back(gradient)[0], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_buckets_equal_those_of_hugging_face(bidirectional):
    ours = positions.relative_buckets(
        GOLDEN["buckets.distance"], buckets=32, max_distance=128, bidirectional=bidirectional
    )
    np.testing.assert_array_equal(ours, GOLDEN[f"buckets.{bidirectional}"])


# ---- Sizes ----


def count(config: Config, *, without: tuple[str, ...] = ()) -> int:
    config = auto.resolve_auto(config, meshes.make_mesh(config, jax.devices()[:1]))
    shapes = jax.eval_shape(functools.partial(step.init_params, config), pipeline.spec(config), jax.random.key(0))
    return tree.num_parameters(
        {name: leaf for name, leaf in tree.flatten(shapes).items() if not name.startswith(without)}
    )


def preset(name: str, **overrides: str) -> Config:
    path = Path(__file__).parents[2] / "configs" / f"{name}.py"
    return loader.load(path, [(key.replace("__", "."), value) for key, value in overrides.items()])


@pytest.mark.parametrize(
    "name, published",
    [
        ("t5_small", 76_961_152),
        ("t5_base", 247_577_856),
        ("t5_large", 783_150_080),
        ("t5_xl", 2_849_757_184),
        ("t5_xxl", 11_135_332_352),
        ("llama_7b", 6_738_415_616),
        ("llama_1b", 1_100_048_384),
    ],
)
def test_parameter_counts_are_the_published_ones(name, published):
    assert count(preset(name)) == published


def test_t5_1_0_base_and_gpt2_have_their_published_sizes():
    t5 = preset("t5_base", model__mlp="relu", model__mlp_dim="3072", model__tied_embeddings="true")
    assert count(t5) == 222_903_552
    assert count(preset("gpt_small", model__vocab_multiple="1")) == 124_439_808


def test_bert_base_has_its_published_size_with_and_without_its_heads():
    config = preset("bert_base", model__vocab_multiple="1")
    assert count(config) == 110_106_428
    assert count(config, without=("mlm/", "head_bias", "pairs/classes/")) == 109_482_240


@pytest.mark.parametrize(
    "name",
    ["tiny", "t5_small", "t5_base", "t5_large", "t5_xl", "t5_xxl", "gpt_small", "llama_1b", "llama_7b", "bert_base"],
)
def test_an_untrained_preset_has_the_loss_of_a_uniform_guess(name):
    # The preset's own shapes would not fit; its scheme does: depth and width are cut, every other choice stays.
    cut = {
        "model__num_layers": "3",
        "model__model_dim": "64",
        "model__mlp_dim": "128",
        "model__num_heads": "4",
        "model__head_dim": "16",
        "tokenizer__vocab_size": "2000",
        "data__batch_size": "4",
        "model__layers": "scan",  # quick to compile at any depth
        "model__dtype": "float32",
        "model__remat": "none",
    }
    if preset(name).model.num_kv_heads:
        cut["model__num_kv_heads"] = "2"
    cut |= (
        {"data__targets_length": "64"}
        if preset(name).data.inputs_length == 0
        else {"data__inputs_length": "64", "data__targets_length": "14"}
    )
    config = preset(name, **cut)
    assert abs(mean_loss(config, init(config), random_batch(config)) - math.log(config.tokenizer.vocab_size)) < 0.5


# ---- Truths of every variant ----


VARIANTS = {
    "t5": {},
    "causal": {"model": {"architecture": "decoder"}},
    "llama": {
        "model": {
            "architecture": "decoder",
            "positions": "rotary",
            "num_kv_heads": 2,
            "scale_attention": True,
            "mlp": "gated_silu",
        }
    },
    "umt5": {"model": {"relative_bias": "per_layer"}},
    "windowed": {
        "model": {
            "architecture": "decoder",
            "positions": "rotary",
            "qk_norm": True,
            "attention_window": 6,
            "rotary": {"scaling": "yarn", "factor": 4.0, "original_length": 16},
        }
    },
    "post_norm": {
        "model": {"norm_position": "post", "norm": "layer", "biases": True, "positions": "learned", "mlp": "relu"}
    },
    "prefix": {"model": {"architecture": "decoder"}, "data": {"objective": "prefix_lm"}},
    "bert": {"model": {**BERT, "head_dim": 8}, "data": {"objective": "mlm_nsp"}},
    "encoder": {"model": {"architecture": "encoder"}},
    "rotary_encoder": {
        "model": {"architecture": "encoder", "positions": "rotary", "norm_position": "post", "mlp": "gated_silu"}
    },
}


def with_model(variant, **model) -> Config:
    sections = VARIANTS[variant]
    return small(**{**sections, "model": {**sections.get("model", {}), **model}})


def loss_and_gradients(config: Config, params, batch: Batch):
    return jax.jit(jax.value_and_grad(lambda p: step.pretrain_loss(config, p, batch, None).objective))(params)


@functools.cache
def unchanged(config: Config):
    """A batch, parameters, and the loss with its gradients, once for all changes."""
    batch, params = random_batch(config), init(config)
    return batch, params, loss_and_gradients(config, params, batch)


@pytest.mark.parametrize(
    "variant, change",
    [
        ("t5", {"layers": "scan"}),
        ("t5", {"remat": "full"}),
        ("t5", {"remat": "qk"}),
        ("t5", {"layers": "scan", "remat": "dots"}),
        ("llama", {"layers": "scan", "remat": "full"}),
        ("umt5", {"layers": "scan"}),
        ("llama", {"layers": "scan", "remat": "qk"}),
        ("prefix", {"remat": "dots"}),
        ("bert", {"layers": "scan", "remat": "dots"}),
        ("bert", {"layers": "scan", "remat": "qk"}),
        ("t5", {"kernels": "cpu"}),
        ("llama", {"kernels": "cpu"}),
        ("bert", {"kernels": "cpu"}),
    ],
)
def test_scan_remat_and_kernels_change_nothing(variant, change):
    layers = 2 if change.get("layers") == "scan" else 1  # remat and kernels are the same in every layer
    plain = with_model(variant, num_layers=layers)
    batch, params, (a, grads) = unchanged(plain)
    b, other_grads = loss_and_gradients(with_model(variant, num_layers=layers, **change), params, batch)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-4), grads, other_grads)


def test_queries_and_keys_are_not_projected_again_when_they_are_saved():
    def products(remat):
        config = with_model("t5", num_layers=1, remat=remat)
        gradients = jax.jit(jax.grad(lambda p: step.pretrain_loss(config, p, random_batch(config), None).objective))
        return gradients.lower(jax.eval_shape(lambda: init(config))).as_text().count("stablehlo.dot_general")

    attentions = 3  # of the encoder, of the decoder, and across
    assert products("full") - products("qk") == 2 * attentions


def influence(config: Config, batch: Batch, row: int = 0) -> np.ndarray:
    """How much decoder (encoder-only: encoder) input j moves output i, by gradients: [L outputs, L inputs].

    Each place reads another id, and the encoder none of them, so that an embedding row's gradient belongs to one place.
    """
    params, model = init(config), Transformer(config)
    ids_L = 3 + np.arange(batch.targets_BL.shape[1])
    one = jax.tree.map(lambda x: x[row : row + 1], batch)
    if one.decoder_BL is None:
        one = one._replace(encoder_BS=ids_L[None])
    else:
        encoder_BS = None if one.encoder_BS is None else np.full_like(one.encoder_BS, 2)
        one = one._replace(decoder_BL=ids_L[None], encoder_BS=encoder_BS)
    weigh_D = jnp.cos(jnp.arange(config.model.model_dim))  # the plain sum of what a layer norm puts out is constant

    @jax.jit
    @jax.jacobian
    def gradient(rows_LD):
        changed = {**params, "embedding": params["embedding"].at[ids_L].set(rows_LD)}
        return model.apply({"params": changed}, one, method="hidden")[0] @ weigh_D

    return np.abs(np.asarray(gradient(params["embedding"][ids_L]))).sum(-1)


def test_no_future_token_moves_a_causal_output():
    for model in ({}, {"architecture": "decoder"}, {"architecture": "decoder", "positions": "rotary"}):
        config = small(model={"num_layers": 1, **model})
        matrix = influence(config, random_batch(config))
        assert (matrix[np.triu_indices(len(matrix), 1)] == 0).all()
        assert (matrix[np.tril_indices(len(matrix))] > 0).all()


def test_a_window_is_all_that_a_token_sees_wherever_its_document_begins():
    config = small(model={**VARIANTS["windowed"]["model"], "num_layers": 1}, data={"cross_document_attention": False})
    batch = random_batch(config)
    place, segments = np.arange(batch.targets_BL.shape[1]), batch.decoder_segments_BL[0]
    distance = place[:, None] - place[None]
    visible = (distance >= 0) & (distance < 6) & (segments[:, None] == segments[None])
    np.testing.assert_array_equal(influence(config, batch) > 0, visible)


def test_a_prefix_is_seen_by_all_and_the_rest_is_causal():
    config = with_model("prefix", num_layers=1)
    batch = random_batch(config)
    matrix = influence(config, batch)
    place = np.arange(len(matrix))
    visible = (place[None] <= place[:, None]) | (place[None] < batch.prefix_BL[0].sum())
    assert ((matrix > 0) == visible).all()


@pytest.mark.parametrize("model", [{}, {"architecture": "decoder"}])
def test_nothing_leaks_across_documents(model):
    config = small(model={"num_layers": 1, **model}, data={"cross_document_attention": False})
    batch = random_batch(config)
    segments = batch.decoder_segments_BL[0]
    matrix = influence(config, batch)
    assert (matrix[segments[:, None] != segments[None]] == 0).all()
    if model:
        return
    # and the encoder: other documents' inputs don't reach a target
    params = init(config)
    place = int(np.flatnonzero(batch.encoder_segments_BS[0] == 1)[0])
    changed = batch._replace(encoder_BS=batch.encoder_BS.copy())
    changed.encoder_BS[0, place] += 1
    a, b = logits(config, params, batch)[0], logits(config, params, changed)[0]
    assert (np.abs(a - b).max(-1)[segments != 1] == 0).all() and np.abs(a - b).max(-1)[segments == 1].max() > 0


@pytest.mark.parametrize("variant", ["bert", "encoder", "rotary_encoder"])
def test_an_encoder_sees_its_document_in_both_directions_and_nobody_sees_padding(variant):
    config = with_model(variant, num_layers=1)
    batch = random_batch(config)
    segments_S = np.repeat([1, 2, 0], [12, 10, 10])
    batch = batch._replace(encoder_segments_BS=np.tile(segments_S, (len(batch.targets_BL), 1)))
    visible = (segments_S[:, None] == segments_S[None]) & (segments_S != 0)[None]
    np.testing.assert_array_equal(influence(config, batch) > 0, visible | np.eye(32, dtype=bool))


def test_a_text_without_token_types_is_the_first_of_a_pair_and_the_second_reads_differently():
    config = small(**VARIANTS["bert"])
    params, batch = init(config), random_batch(config)
    none, first, second = (
        logits(config, params, batch._replace(token_types_BS=types))
        for types in (None, np.zeros_like(batch.encoder_BS), np.ones_like(batch.encoder_BS))
    )
    np.testing.assert_array_equal(none, first)
    assert np.abs(none - second).max() > 1e-3


def test_bert_begins_with_its_own_initialisation():
    for name, leaf in tree.flatten(
        init(small(**VARIANTS["bert"], tokenizer={"vocab_size": 500, "num_sentinels": 20}))
    ).items():
        if name.endswith(("scale", "bias")):
            assert (leaf == name.endswith("scale")).all(), name
        else:
            assert float(jnp.std(leaf)) == pytest.approx(0.02, rel=0.3), name


def test_a_query_that_may_see_nothing_gets_nothing(rng):
    q, k, v = (jnp.asarray(rng.normal(size=(2, 1, 3, 4)), jnp.float32) for _ in range(3))
    mask = segment_mask(jnp.array([[1, 1, 2], [1, 1, 1]]), jnp.array([[1, 1, 1], [1, 1, 1]]))
    out = attend(q, k, v, mask_B1LS=mask)
    assert (out[0, 0, 2] == 0).all() and (np.abs(out[1]) > 0).all()


def test_attend_equals_softmax_in_float64(rng):
    q, k, v = (rng.normal(size=(2, 4, 5, 8)), rng.normal(size=(2, 2, 7, 8)), rng.normal(size=(2, 2, 7, 8)))
    bias = rng.normal(size=(1, 4, 5, 7))
    scores = np.einsum("bnlh,bnsh->bnls", q, k.repeat(2, 1)) + bias
    scores = np.where(np.tril(np.ones((5, 7)), 2), scores, -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    ours = attend(
        *(jnp.asarray(x, jnp.float32) for x in (q, k, v)),
        bias_1NLS=jnp.asarray(bias, jnp.float32),
        mask_B1LS=causal_mask(5, 7, 2),
    )
    np.testing.assert_allclose(ours, np.einsum("bnls,bnsh->bnlh", weights, v.repeat(2, 1)), atol=1e-5)


def products_loss(kernels, x):
    return sum(jnp.square(y).sum() for y in tpu_matmul.products((x, x), kernels))


def a_product():
    keys = jax.random.split(jax.random.key(0), 3)
    kernels = tuple(jax.random.normal(key, (8, size)) for key, size in zip(keys, (6, 4), strict=False))
    return kernels, jax.random.normal(keys[2], (8, 5, 8))


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 2, "fsdp": 4, "slices": 2}])
def test_products_in_turn_have_the_values_and_gradients_of_plain_ones(monkeypatch, axes):
    plain = jax.value_and_grad(products_loss, argnums=(0, 1))(*a_product())
    monkeypatch.setattr(tpu_matmul, "_serializes_backward", lambda: True)
    mesh = meshes.make_mesh(small(mesh={"data": 1} | axes))
    with jax.set_mesh(mesh):
        place = lambda x, *names: jax.device_put(x, jax.sharding.NamedSharding(mesh, logical_axes.spec(names)))
        kernels, x = a_product()
        operands = tuple(place(kernel, "embed", "mlp") for kernel in kernels), place(x, "batch", None, None)
        in_turn = jax.jit(jax.value_and_grad(products_loss, argnums=(0, 1)))(*operands)
        assert "optimization_barrier" in str(jax.make_jaxpr(jax.grad(products_loss))(*a_product()))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4), in_turn, plain)


@pytest.mark.parametrize(
    "chip, axes, turns",
    [
        ("TPU v5 lite", (1, 8, 1, 1), True),
        ("TPU v5 lite", (1, 4, 2, 1), False),
        ("TPU v5 lite", (2, 4, 1, 1), True),
        ("TPU v5", (1, 8, 1, 1), False),
        ("TPU v5 lite", (1, 1, 1, 1), False),
    ],
)
def test_products_take_turns_on_v5e_where_rows_are_split_and_kernels_are_not_by_tensor(monkeypatch, chip, axes, turns):
    monkeypatch.setattr(tpu_matmul, "device_kind", lambda: chip)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(axes, meshes.AXES)):
        assert tpu_matmul._serializes_backward() is turns


@pytest.mark.parametrize("turns", [False, True])
def test_what_remat_dots_keeps_of_products_is_not_computed_again(monkeypatch, turns):
    monkeypatch.setattr(tpu_matmul, "_serializes_backward", lambda: turns)
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    layer = jax.checkpoint(
        lambda x, kernels: sum(jnp.tanh(y) for y in tpu_matmul.products((x, x), kernels)), policy=policy
    )

    def loss(kernels, x):
        return jax.lax.scan(lambda x, each: (layer(x, each), None), x, kernels)[0].sum()

    with jax.set_mesh(meshes.make_mesh(small())):
        program = jax.make_jaxpr(jax.grad(loss))(2 * (jnp.ones((3, 8, 8)),), jnp.ones((8, 5, 8)))
    assert str(program).count("dot_general") == 2 + 4  # forward; of kernels and of x


FORMS = {  # mesh, length, heads of keys, what may be seen, relative bias
    "packed": ({}, 160, 4, {"causal": True, "segments": True}, False),
    "relative": ({"data": 2, "fsdp": 2, "tensor": 2}, 12, 4, {}, True),
    "prefix": ({}, 160, 4, {"causal": True, "segments": True, "prefix": True, "window": 7}, False),
    "window": ({}, 672, 1, {"causal": True, "window": 100}, False),
    "context": (
        {"data": 2, "tensor": 2, "context": 2},
        16,
        2,
        {"causal": True, "segments": True, "prefix": True, "window": 5},
        True,
    ),
    "long_context": ({"context": 2, "data": 1}, 1024, 2, {"causal": True, "window": 140}, False),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_tpu_kernel_equals_plain_attention_with_gradients(rng, monkeypatch, form):
    axes, length, kv_heads, rules, relative = FORMS[form]
    monkeypatch.setattr(tpu_attention, "SCORES", 1)  # blocks of 128 queries
    monkeypatch.setattr(tpu_attention, "UNROLLED", 2)
    rows, heads = 8 if length < 500 else 1, 4 if length < 500 else 2
    kv_heads = min(heads, kv_heads)
    q, weight = (jnp.asarray(rng.normal(size=(rows, heads, length, 8)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(rows, kv_heads, length, 8)), jnp.float32) for _ in range(2))
    bias = jnp.asarray(rng.normal(size=(1, heads, length, length)), jnp.float32) if relative else None
    ids = jnp.asarray(np.sort(rng.integers(0, 4, (rows, length)))) if "segments" in rules else None  # 0: padding
    prefix = jnp.asarray(rng.random((rows, length)) < 0.3) if "prefix" in rules else None
    causal, window = rules.get("causal", False), rules.get("window", 0)

    def kernel(q, k, v, bias):
        bias, segments = None if bias is None else tpu_attention.spread(bias), None if ids is None else (ids, ids)
        out = tpu_attention.attend(q, k, v, bias, segments, prefix, causal=causal, window=window, interpret=True)
        return (out * weight).sum()

    def plain(q, k, v, bias):
        seen = MaskSpec(causal, ids, ids, prefix, window)
        return (attend(q, k, v, bias_1NLS=bias, mask_B1LS=seen) * weight).sum()

    of = (0, 1, 2, 3) if relative else (0, 1, 2)
    wanted = jax.jit(jax.value_and_grad(plain, of))(q, k, v, bias)
    mesh = meshes.make_mesh(small(mesh=axes), jax.devices()[: math.prod(axes.values())])
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(kernel, of))(q, k, v, bias)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=3e-5)


def test_a_step_for_tpus_has_the_kernel_in_every_attention_and_other_machines_refuse_it():
    config = small(model={"num_layers": 1, "kernels": "tpu", "layers": "scan", "dtype": "bfloat16"}, mesh={"fsdp": 8})
    with pytest.raises(ConfigError, match="kernels=auto"):
        auto.resolve_auto_for(config, "cpu")
    mesh, batch = meshes.make_mesh(config), pipeline.spec(config)
    abstract = step.abstract_state(config, batch, mesh)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    with jax.set_mesh(mesh):
        lowered = step.jit_train_step(config, abstract).trace(abstract, shapes).lower(lowering_platforms=("tpu",))
    text = lowered.as_text()
    assert (text.count('kernel_name = "attention_forward"'), text.count('kernel_name = "attention_backward"')) == (3, 3)
    # The gradients of gated MLPs' inputs; queries, keys and values of small heads, forward and backward.
    assert text.count("optimization_barrier") == 2 * 2 + 3 * 3 * 2


def test_a_gradient_kept_apart_is_the_gradient(rng):
    x, weight = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)[:2]
    np.testing.assert_array_equal(jax.grad(lambda x: (tpu_matmul.gradient_barrier(x) * weight).sum())(x), weight)


def test_padding_rows_of_the_vocabulary_never_win():
    padded, exact = (small(model={"num_layers": 1, **more}) for more in ({}, {"vocab_multiple": 1}))
    params = init(padded)
    cut = {**params, "embedding": params["embedding"][:500], "head": params["head"][:, :500]}
    batch = random_batch(padded)
    ours = logits(padded, params, batch)
    assert ours.shape[-1] == 512 and (ours[..., 500:] < -1e8).all()
    assert mean_loss(padded, params, batch) == pytest.approx(float(mean_loss(exact, cut, batch)), rel=1e-6)


@pytest.mark.parametrize("variant", ["t5", "causal", "llama", "umt5", "windowed"])
def test_cached_decoding_equals_the_full_forward(variant):
    config = with_model(variant, num_layers=1)
    params, batch = init(config), random_batch(config)
    apply = jax.jit(functools.partial(Transformer(config).apply, {"params": params}), static_argnames="method")
    full = apply(batch)
    length = batch.decoder_BL.shape[1]
    encoded = apply(batch.encoder_BS, method="encode") if batch.encoder_BS is not None else None
    cache = Transformer(config).apply({"params": params}, 8, length, encoded, method="prepare_cache")
    first, cache = apply(batch.decoder_BL[:, :5], cache, 0, method="decode")
    np.testing.assert_allclose(first, full[:, :5], atol=2e-5, rtol=1e-4)
    for index in range(5, length):
        one, cache = apply(batch.decoder_BL[:, index : index + 1], cache, jnp.int32(index), method="decode")
        np.testing.assert_allclose(one[:, 0], full[:, index], atol=2e-5, rtol=1e-4)


def test_dropout_is_random_in_training_and_absent_in_evaluation():
    config = small(model={"num_layers": 1, "dropout_rate": 0.5})
    params, batch = init(config), random_batch(config)

    def loss(key):
        return float(mean_loss(config, params, batch, key))

    assert loss(jax.random.key(0)) == loss(jax.random.key(0)) != loss(jax.random.key(1))
    assert loss(None) == loss(None) != loss(jax.random.key(0))


def test_a_post_norm_stack_drops_nothing_behind_its_last_norm():
    config = with_model("bert", dropout_rate=0.5)
    params, batch = init(config), random_batch(config)

    @jax.jit
    def hidden(key):
        return Transformer(config).apply({"params": params}, batch, train=True, method="hidden", rngs={"dropout": key})

    one, other = hidden(jax.random.key(0)), hidden(jax.random.key(1))
    assert np.abs(one - other).max() > 0.1
    np.testing.assert_allclose(one.std(-1), 1, rtol=1e-3)


@pytest.mark.parametrize("variant", ["t5", "bert"])
def test_float32_is_kept_where_it_counts(variant):
    sections = VARIANTS[variant]
    config = small(**{**sections, "model": {**sections.get("model", {}), "dtype": "bfloat16"}})
    params, batch = init(config), random_batch(config)
    jaxpr = jax.make_jaxpr(lambda p: step.pretrain_loss(config, p, batch, None))(params)

    def equations(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for sub in jax.extend.core.jaxprs_in_params(equation.params):
                yield from equations(sub)

    kinds = {"exp": "softmax and loss", "log": "loss", "rsqrt": "norm", "reduce_sum": "sums"}
    found = {
        e.primitive.name
        for e in equations(jaxpr.jaxpr)
        if e.primitive.name in kinds and e.outvars[0].aval.dtype == jnp.float32
    }
    assert {"exp", "log", "rsqrt"} <= found
    wrong = [
        e
        for e in equations(jaxpr.jaxpr)
        if e.primitive.name in ("log", "rsqrt") and e.outvars[0].aval.dtype != jnp.float32
    ]
    assert not wrong
    assert logits(config, params, batch).dtype == jnp.float32
    assert variant != "bert" or pair_logits(config, params, batch).dtype == jnp.float32
