"""Rows of examples: every example once, within the limits, and with the loss of an example in its own row."""

import functools
import json

import jax
import numpy as np
import pytest
from conftest import small
from model_variants import drawn_params

from t5like import tree
from t5like.config.schema import TokenizerConfig
from t5like.data.store.preparation import prepare
from t5like.data.supervised.examples import Examples
from t5like.data.supervised.packing import ExampleRows, blank_rows, pack
from t5like.data.tokenizers.tokenizer import train_tokenizer
from t5like.optim import step
from t5like.types import Batch

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]


# ---- Packing ----


@pytest.mark.parametrize(("total", "capacity"), [(1, (5,)), (7, (9, 4)), (3000, (100, 30)), (20_000, (64,))])
def test_every_example_is_in_one_row_and_no_row_is_too_long(total, capacity):
    lengths_NC = np.random.default_rng(0).integers(1, np.array(capacity) + 1, (total, len(capacity)))
    packing = pack(lengths_NC, capacity, seed=3)
    assert sorted(packing.order_N) == list(range(total)) and packing.first[0] == 0 and packing.first[-1] == total
    assert (np.diff(packing.first) > 0).all()
    used_RC = np.add.reduceat(lengths_NC[packing.order_N], packing.first[:-1], axis=0)
    assert (used_RC <= capacity).all()
    assert packing.efficiency == pytest.approx(used_RC.sum() / (len(used_RC) * sum(capacity)))


@pytest.mark.parametrize("total", [500, 20_000])
def test_short_examples_fill_their_rows(total):
    lengths_NC = np.random.default_rng(0).geometric(0.02, (total, 1)).clip(1, 512)
    assert pack(lengths_NC, (512,), seed=0).efficiency > 0.95


def test_only_the_seed_decides_which_examples_share_a_row():
    lengths_NC = np.random.default_rng(0).integers(1, 50, (1000, 1))
    rows = lambda seed: pack(lengths_NC, (100,), seed).order_N.tolist()
    assert rows(1) == rows(1) != rows(2)


# ---- Rows ----


def sections(shape):
    architecture, _, kind = shape.partition(" ")
    data = {
        "objective": "supervised",
        "inputs_length": 48,
        "targets_length": 24,
        "heldout_fraction": 0.05,
        "num_workers": 1,
    }
    model = {"architecture": architecture, "num_layers": 1}
    if "rotary" in kind:
        model |= {"positions": "rotary", "num_kv_heads": 2}
    if "chat" in kind:
        data["messages_field"] = "talk"
    return data, model


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A function from the name of a shape, and whether rows are packed, to a config and its rows."""
    directory, rng = tmp_path_factory.mktemp("packing"), np.random.default_rng(0)
    sentence = lambda most: " ".join(rng.choice(WORDS, rng.integers(1, most)))
    train_tokenizer(
        [f"user: {i} {sentence(9)}" for i in range(500)],
        TokenizerConfig(vocab_size=320, num_sentinels=20),
        directory / "model",
    )
    with open(directory / "a.jsonl", "w") as file:
        for i in range(60):
            talk = [
                {"role": role, "content": sentence(3)}
                for _ in range(rng.integers(1, 4))
                for role in ("user", "assistant")
            ]
            talk[0]["content"] += str(i)
            file.write(json.dumps({"inputs": f"{i} {sentence(7)}", "targets": sentence(5), "talk": talk}) + "\n")

    @functools.cache
    def make(shape, packing=True):
        data, model = sections(shape)
        data |= {
            "source": f"jsonl:{directory}/a.jsonl",
            "cache_directory": str(directory / "prepared"),
            "packing": packing,
        }
        tokenizer = {"path": str(directory / "model"), "vocab_size": 320, "num_sentinels": 20}
        config = small(tokenizer=tokenizer, data=data, model=model)
        store = prepare(config, progress=False).stores[0]
        return config, ExampleRows(config, Examples(config, config.data.source[0], store, "train"))

    return make


SHAPES = (
    "encoder_decoder",
    "encoder_decoder rotary",
    "encoder_decoder chat",
    "decoder",
    "decoder rotary",
    "decoder chat",
)


def texts(ids, segments, chosen=True):
    """The ids of each segment of a row, in order, as a list of lists."""
    return [ids[(segments == number) & chosen].tolist() for number in range(1, segments.max() + 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_contains_its_examples_in_order(setting, shape):
    """Every example's tokens, read from the store in plain Python, are in one row with the documented layout."""
    config, rows = setting(shape)
    examples = rows.examples
    whole = examples.stream.windows(np.zeros(1, np.int64), examples.stream.num_tokens)[0].tolist()
    units = {}
    for n, (begin, cut, end) in enumerate(zip(examples.begin_N, examples.cut_N, examples.end_N, strict=True)):
        learned = [any(start <= place < stop for start, stop in examples.targets_M2) for place in range(begin, end)]
        units[n] = (whole[begin:cut], whole[cut:end], learned)
    pairs = []
    batch = rows.batch(np.arange(rows.count))
    for r in range(rows.count):
        segments = batch.decoder_segments_BL[r]
        assert (np.diff(segments[segments > 0]) >= 0).all() and (segments[: (segments > 0).sum()] > 0).all()
        for name in ("decoder", "encoder")[: 1 + (batch.encoder_BS is not None)]:
            marks = batch.decoder_segments_BL if name == "decoder" else batch.encoder_segments_BS
            positions = batch.decoder_positions_BL if name == "decoder" else batch.encoder_positions_BS
            assert all(part == list(range(len(part))) for part in texts(positions[r], marks[r]))
        targets_of_row, decoder_inputs, weights = (
            texts(x[r], segments) for x in (batch.targets_BL, batch.decoder_BL, batch.weights_BL)
        )
        assert not batch.weights_BL[r][segments == 0].any()
        if batch.encoder_BS is not None:
            inputs = texts(batch.encoder_BS[r], batch.encoder_segments_BS[r])
            assert decoder_inputs == [[0, *part[:-1]] for part in targets_of_row] and all(all(part) for part in weights)
            pairs += zip(inputs, targets_of_row, strict=True)
        else:
            prefix = (
                [[]] * len(targets_of_row)
                if "chat" in shape
                else texts(batch.decoder_BL[r], segments, batch.prefix_BL[r])
            )
            pairs += [(p, s[len(p) :]) for p, s in zip(prefix, targets_of_row, strict=True)]
            assert decoder_inputs == [[*p, 0, *s[len(p) : -1]] for p, s in zip(prefix, targets_of_row, strict=True)]
            learned = {tuple(i + t): flags for i, t, flags in units.values()}
            assert [list(map(bool, part)) for part in weights] == [learned[tuple(part)] for part in targets_of_row]
    assert sorted(pairs) == sorted((inputs, targets) for inputs, targets, _ in units.values())
    assert rows.count < len(examples) and 0.5 < rows.efficiency <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_do_not_depend_on_the_other_rows_of_a_batch(setting, shape):
    """So any process makes its own rows of a batch, in any order, and its fields are those of a blank batch."""
    config, rows = setting(shape)
    numbers = np.random.default_rng(0).integers(0, rows.count, 12)
    whole, blank = rows.batch(numbers), blank_rows(config, 12)
    parts = [rows.batch(part) for part in np.split(numbers, [1, 5])]
    for together, field, *separate in zip(whole, blank, *parts, strict=True):
        assert (together is None) == (field is None)
        if field is not None:
            assert together.shape == field.shape and together.dtype == field.dtype
            np.testing.assert_array_equal(together, np.concatenate(separate))


# ---- What the model makes of them ----


def padded(batch: Batch, config, count: int) -> Batch:
    """The batch with blank rows behind it, so that one program runs all."""
    blank = blank_rows(config, count - len(batch.targets_BL))
    return jax.tree.map(lambda x, y: np.concatenate([x, y]), batch, blank)


@functools.cache
def gradient(config):
    def objective(params, batch):
        loss = step.pretrain_loss(config, params, batch, None)
        return loss.objective, loss.metrics

    return jax.jit(jax.value_and_grad(objective, has_aux=True))


@functools.cache
def params_of(config):
    return drawn_params(config, blank_rows(config, 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_examples_have_the_loss_and_the_gradients_of_examples_alone(setting, shape):
    (config, packed), (_, alone) = setting(shape), setting(shape, packing=False)
    assert alone.count == len(alone.examples) > 1.5 * packed.count
    params = params_of(config)
    results = [
        gradient(config)(params, padded(rows.batch(np.arange(rows.count)), config, alone.count + 1))
        for rows in (packed, alone)
    ]
    ((loss, metrics), grads), ((loss_alone, metrics_alone), grads_alone) = jax.device_get(results)
    np.testing.assert_allclose(loss, loss_alone, rtol=1e-5)
    assert metrics["loss"].weight == metrics_alone["loss"].weight > 100
    for name, leaf in tree.flatten(grads_alone).items():
        np.testing.assert_allclose(
            tree.flatten(grads)[name], leaf, rtol=1e-4, atol=1e-5 * np.abs(leaf).max(), err_msg=name
        )


@pytest.mark.parametrize("shape", ["encoder_decoder", "decoder rotary"])
def test_no_gradient_reaches_another_example_of_the_row(setting, shape):
    (config, rows), (_, alone) = setting(shape), setting(shape, packing=False)
    batch = rows.batch(np.arange(rows.count))
    row = int(batch.decoder_segments_BL.max(axis=1).argmax())
    batch = jax.tree.map(lambda x: x[row : row + 1], batch)
    mine = batch.decoder_segments_BL == 2
    seen = set(batch.decoder_BL[mine])
    if batch.encoder_BS is not None:
        seen |= set(batch.encoder_BS[batch.encoder_segments_BS == 2])
    batch = batch._replace(weights_BL=batch.weights_BL * mine)
    _, grads = gradient(config)(params_of(config), padded(batch, config, alone.count + 1))
    touched = set(np.flatnonzero(np.abs(np.asarray(grads["embedding"])).max(axis=1)))
    assert touched == seen and mine.any()
    assert set(batch.decoder_BL.flat) - seen  # of the others, there are ids that it does not have
