"""Initial weights from another run: the source of each parameter, logits of the adapted model, refusals."""

import dataclasses
import io
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from conftest import SYLLABLES, random_batch, small
from model_variants import drawn_params
from test_recovery import flip, half_delete, truncate

from t5like import tree
from t5like.checkpoint.checkpoints import Checkpoints
from t5like.checkpoint.init_from import load_initial_weights
from t5like.checkpoint.parameter_sources import MEAN_ROW, map_vocabulary, source_names
from t5like.checkpoint.run_directory import write_imported
from t5like.config import loader
from t5like.config.schema import Config
from t5like.data import pipeline
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.errors import CheckpointError, DamagedCheckpoint
from t5like.model.transformer import Transformer
from t5like.optim import train_state
from t5like.optim.new_parameters import is_new
from t5like.sharding import mesh as meshes
from t5like.types import Batch


def made_tokenizer(extra: list[str], sentinels: int) -> Tokenizer:
    """A tokenizer of 300 ids and the `extra` pieces, which come before the common ones."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(f"{first}{second} {second}" for first in SYLLABLES for second in SYLLABLES),
        model_writer=model,
        vocab_size=300 + len(extra),
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        byte_fallback=True,
        user_defined_symbols=["\n", *extra],
        minloglevel=2,
    )
    return Tokenizer(model.getvalue(), num_sentinels=sentinels)


OLD, NEW = made_tokenizer([], 20), made_tokenizer(["alpha", "beta", "gamma"], 25)
VOCABULARY = {"tokenizer": {"vocab_size": OLD.vocab_size}}
MESH = meshes.make_mesh(small(), jax.devices()[:1])


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A run of an untrained decoder-only model of two layers: its directory, its config, its parameters by name."""
    config = small(model={"architecture": "decoder", "model_dim": 16, "mlp_dim": 32}, **VOCABULARY)
    directory = tmp_path_factory.mktemp("decoder")
    return directory, config, saved(directory, config, OLD)


def saved(directory, config: Config, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    mesh = meshes.make_mesh(dataclasses.replace(config, mesh=config.mesh), jax.devices()[:1])
    batch = random_batch(config)
    params = tree.flatten(drawn_params(config, batch))
    state = train_state.new_state(config, batch, train_state.abstract_state(config, batch, mesh), params)
    checkpoints = Checkpoints(directory / "checkpoints", keep=2)
    checkpoints.save(state, config=config, tokenizer=tokenizer.model_bytes, tokenizer_hash=tokenizer.hash)
    later = state._replace(step=jax.device_put(np.int32(1), state.step.sharding))
    checkpoints.save(later, config=config, tokenizer=tokenizer.model_bytes, tokenizer_hash=tokenizer.hash)
    checkpoints.close()
    (directory / "config.json").write_text(loader.to_json(config))
    return {name: np.asarray(leaf) for name, leaf in tree.flatten(state.params).items()}


def begun(decoder, tokenizer: Tokenizer, *, axes: dict | None = None, **sections) -> tuple[Config, dict, list[str]]:
    """Initialize a run from the decoder: its config, all parameters by name, the report."""
    directory, old, _ = decoder
    init = {"checkpoint": str(directory), **sections.pop("init_from", {})}
    model = {"architecture": "decoder", "model_dim": 16, "mlp_dim": 32, **sections.pop("model", {})}
    config = small(
        model=model, init_from=init, mesh=axes or {}, **sections,
        tokenizer={"vocab_size": tokenizer.vocab_size, "num_sentinels": tokenizer.num_sentinels},
    )  # fmt: skip
    mesh = meshes.make_mesh(config, jax.devices() if axes else jax.devices()[:1])
    batch = random_batch(config)
    abstract = train_state.abstract_state(config, batch, mesh)
    initial = load_initial_weights(config, abstract, tokenizer)
    for name, array in initial.params.items():
        assert array.sharding == tree.flatten(abstract.params)[name].sharding, name
    state = train_state.new_state(config, batch, abstract, initial.params)
    params = {name: np.asarray(leaf) for name, leaf in tree.flatten(state.params).items()}
    return config, params, [" ".join(line.split()) for line in initial.report]


def logits(config: Config, params: dict, ids_BL: np.ndarray) -> np.ndarray:
    batch = Batch(ids_BL, ids_BL, np.ones(ids_BL.shape))
    return np.asarray(jax.jit(lambda params: Transformer(config).apply({"params": params}, batch))(tree.nested(params)))


def test_rows_are_mapped_by_piece_special_ids_by_role_and_sentinels_by_index():
    rows = map_vocabulary(OLD, NEW, 384)
    assert rows.text == "320 of 328 rows by piece, 8 at the mean"
    for token, old in enumerate(rows.old_V[: NEW.vocab_size]):
        new_name = NEW.name(token)
        names = [OLD.name(each) for each in range(OLD.vocab_size)]
        assert (names[old] == new_name) if old != MEAN_ROW else (new_name not in names), new_name
    assert (rows.old_V[NEW.vocab_size :] == MEAN_ROW).all()
    back = map_vocabulary(NEW, OLD, 320)
    assert back.text == "320 of 320 rows by piece, 0 at the mean, 8 unused old rows"


def test_a_larger_vocabulary_keeps_the_logits_of_old_tokens_and_new_rows_are_the_mean(decoder, rng):
    _, old_config, old = decoder
    adapt = {"adapt": ("vocabulary",)}
    config, params, report = begun(decoder, NEW, axes={"fsdp": 2, "tensor": 2, "data": 2}, init_from=adapt)
    rows = map_vocabulary(OLD, NEW, config.vocab_rows).old_V
    new_ids = np.flatnonzero(rows != MEAN_ROW)
    ids_BL = new_ids[rng.integers(0, len(new_ids), (2, 9))]
    ours, theirs = logits(config, params, ids_BL), logits(old_config, old, rows[ids_BL])
    np.testing.assert_allclose(ours[..., new_ids], theirs[..., rows[new_ids]], rtol=1e-5, atol=1e-6)
    mean_D = old["embedding"][: OLD.vocab_size].mean(0)
    added = [NEW.name(token) for token in np.flatnonzero(rows[: NEW.vocab_size] == MEAN_ROW)]
    assert "alpha" in added and len(added) == 8
    for token in np.flatnonzero(rows == MEAN_ROW):
        np.testing.assert_allclose(params["embedding"][token], mean_D, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        params["head"][:, rows == MEAN_ROW][:, 0], old["head"][:, : OLD.vocab_size].mean(1), atol=1e-6
    )
    assert "head 320 of 328 rows by piece, 8 at the mean" in report


def test_a_decoder_initializes_an_encoder_decoder_and_a_deeper_stack_repeats_layers(decoder):
    _, _, old = decoder
    model = {"architecture": "encoder_decoder", "num_layers": 5, "num_decoder_layers": 2}
    adapt = {"adapt": ("architecture", "depth")}
    _, params, report = begun(decoder, OLD, init_from=adapt, model=model, data={"objective": "span_corruption"})
    layers = [0, 1, 0, 1, 0]
    assert [line for line in report if "random" in line] == ["encoder/relative_bias/table new, random"]
    for name, value in params.items():
        if name == "encoder/relative_bias/table":
            continue
        source = name.replace("encoder/", "decoder/").replace("cross_attention", "attention")
        expected = old[source][layers] if name.startswith("encoder/layers/") else old[source]
        np.testing.assert_array_equal(value, expected, err_msg=name)
    assert "decoder/layers/attention/key/kernel copied" in report
    assert "decoder/layers/cross_attention/key/kernel copied, from decoder/layers/attention/key/kernel" in report
    assert (
        "encoder/layers/attention/key/kernel stacked from layers 0 1 0 1 0, from decoder/layers/attention/key/kernel"
        in report
    )
    assert len(report) == len(params)


def test_encoder_and_decoder_of_other_sizes_come_from_two_checkpoints(decoder, rng, tmp_path):
    directory, _, old = decoder
    sizes = {"model_dim": 8, "mlp_dim": 16, "num_heads": 2}
    other_config = small(model={"architecture": "decoder", "num_layers": 1, **sizes}, **VOCABULARY)
    shapes = train_state.abstract_state(other_config, random_batch(other_config), MESH).params
    other = jax.tree.map(lambda leaf: jnp.float32(rng.normal(size=leaf.shape)), shapes)
    write_imported(other, other_config, OLD, tmp_path / "run")
    model = {"model_dim": 16, "mlp_dim": 32, "num_decoder_layers": 1, "separate_embeddings": True}
    model |= {f"decoder_{name}": size for name, size in sizes.items()}
    init = {"checkpoint": str(directory), "adapt": "architecture", "decoder_checkpoint": str(tmp_path / "run")}
    tokenizer = {"vocab_size": OLD.vocab_size, "num_sentinels": OLD.num_sentinels}
    config = small(model=model, data={"objective": "prefix_lm"}, init_from=init, tokenizer=tokenizer)
    abstract = train_state.abstract_state(config, random_batch(config), MESH)
    weights = load_initial_weights(config, abstract, OLD)
    assert weights.source == f"step 1 of {directory} and step 0 of {tmp_path}/run" and not weights.differs
    other, report = tree.flatten(other), [" ".join(line.split()) for line in weights.report]
    assert len(report) == len(tree.flatten(abstract.params))
    new = {name for name in tree.flatten(abstract.params) if "cross_attention" in name} | {
        "encoder/relative_bias/table"
    }
    assert {line.partition(" ")[0] for line in report if line.endswith(" new, random")} == new
    for name, value in weights.params.items():
        of_encoder = name.startswith("encoder/") or name == "embedding"
        expected = old[name.replace("encoder/", "decoder/")] if of_encoder else other[name.removeprefix("decoder_")]
        np.testing.assert_array_equal(value, expected, err_msg=name)
    assert f"decoder_embedding copied, from embedding, of {tmp_path}/run" in report
    assert f"encoder/layers/mlp/in/kernel copied, from decoder/layers/mlp/in/kernel, of {directory}" in report
    deeper = dataclasses.replace(config, model=dataclasses.replace(config.model, num_decoder_layers=2))
    message = (
        f"decoder_checkpoint={tmp_path}/run does not fit: it has 1 layers where .*init_from.adapt=architecture,depth"
    )
    with pytest.raises(CheckpointError, match=message):
        load_initial_weights(deeper, train_state.abstract_state(deeper, random_batch(deeper), MESH), OLD)
    nowhere = dataclasses.replace(config, init_from=dataclasses.replace(config.init_from, decoder_checkpoint="/none"))
    with pytest.raises(CheckpointError, match="init_from.decoder_checkpoint=/none contains no run"):
        load_initial_weights(nowhere, abstract, OLD)


def test_cross_attention_is_random_as_a_whole_if_one_shape_differs():
    old = small(model={"architecture": "decoder"})
    new = small(data={"objective": "prefix_lm"}, init_from={"checkpoint": "old", "adapt": ("architecture",)})
    of = lambda config: tree.flatten(train_state.abstract_state(config, random_batch(config), MESH).params)
    stored, wanted = of(old), of(new)
    key = "decoder/layers/cross_attention/key/kernel"  # as of an encoder with another model_dim
    other = {**wanted, key: jax.ShapeDtypeStruct((2, 48, 32), np.float32)}
    crossed = {name for name in wanted if "cross_attention" in name}
    assert len(crossed) == 5
    for shapes, new_names in ((wanted, set()), (other, crossed)):
        names = source_names(new, old, shapes, stored)
        assert {name for name, source in names.items() if source is None} == new_names | {"encoder/relative_bias/table"}
        assert all(is_new(new, name) == (name in crossed or "relative" in name and "enc" in name) for name in names)


@pytest.mark.parametrize(
    "tokenizer, model, message",
    [
        (NEW, {}, r"its tokenizer is different \(320 ids, not 328\); use init_from.adapt=vocabulary"),
        (OLD, {"num_layers": 3}, "it has 2 layers where this model has 3; use init_from.adapt=depth"),
        (OLD, {"num_layers": 1}, r"float32\[2, .*, not float32\[1, "),
        (OLD, {"architecture": "encoder_decoder", "num_layers": 3},
         "decoder-only model, not model.architecture=encoder_decoder; .* use init_from.adapt=architecture,depth"),
    ],
)  # fmt: skip
def test_a_difference_is_refused_with_the_adapt_option_that_allows_it(decoder, tokenizer, model, message):
    with pytest.raises(CheckpointError, match=message):
        begun(decoder, tokenizer, model=model, data={"objective": "prefix_lm"})


@pytest.mark.parametrize("damage", [flip, truncate, half_delete])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(decoder, damage, tmp_path, capsys):
    shutil.copytree(decoder[0], tmp_path / "run")
    copied = (tmp_path / "run", *decoder[1:])
    damage(tmp_path / "run" / "checkpoints" / "1")
    _, params, _ = begun(copied, OLD)
    assert {name: array.tobytes() for name, array in params.items()} == {
        name: array.tobytes() for name, array in decoder[2].items()
    }
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("t5like: WARNING: ") and line.endswith("; the checkpoint of step 0 is used instead")
    with pytest.raises(DamagedCheckpoint, match="run/checkpoints/1"):
        begun(copied, OLD, init_from={"step": 1})
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()


def test_a_relative_checkpoint_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = small(init_from={"checkpoint": "runs/first"}, tokenizer={"vocab_size": 400})
    assert config.init_from.checkpoint == f"{tmp_path}/runs/first"
    assert config.tokenizer.path == f"{tmp_path}/runs/first/tokenizer.model"
    other = {"checkpoint": "runs/first", "adapt": "vocabulary"}
    assert not small(init_from=other).tokenizer.path


def test_a_classifier_with_adapters_has_the_pooler_of_bert(tmp_path):
    model = {"architecture": "encoder", "head": "mlm", "token_types": 2, "num_layers": 1}
    stored = saved(tmp_path, small(model=model, data={"objective": "mlm_nsp"}, **VOCABULARY), OLD)
    config = small(
        model=model, data={"objective": "classification", "labels": ("a", "b")}, **VOCABULARY,
        init_from={"checkpoint": str(tmp_path)}, lora={"rank": 2, "targets": (".*/query/kernel",)},
    )  # fmt: skip
    abstract = train_state.abstract_state(config, pipeline.spec(config), MESH)
    initial = load_initial_weights(config, abstract, OLD)
    assert list(initial.params) == ["label_head/pooler/kernel"]  # classes are random
    np.testing.assert_array_equal(initial.params["label_head/pooler/kernel"], stored["pairs/pooler/kernel"])
