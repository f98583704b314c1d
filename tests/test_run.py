"""`import t5like`: `load`, `Run`, and the notebook."""

import json
import subprocess
import sys

import jax
import matplotlib
import numpy as np
import pytest
from conftest import small
from documents import ROOT
from model_variants import drawn_params

import t5like
from t5like import errors
from t5like.checkpoint import run_directory
from t5like.data import pipeline
from t5like.data.pipeline import Batches
from t5like.data.store import preparation
from t5like.data.tokenizers.vocabulary import Vocabulary
from t5like.model.intermediates import INTERMEDIATES
from t5like.optim.step import pretrain_loss
from t5like.run import Run
from t5like.sharding import auto
from t5like.sharding import mesh as meshes
from t5like.types import Batch

loss_of = jax.jit(pretrain_loss, static_argnums=0)
TEXT, TARGET = "ba <extra_id_0> de go", "<extra_id_0> fi"


@pytest.fixture(scope="module")
def run(trained) -> Run:
    return t5like.load(trained)


@pytest.fixture(scope="module", params=["decoder", "encoder"])
def untrained(request, run) -> Run:
    """A model of another architecture with random parameters, and the tokenizer of the run."""
    sizes = {"vocab_size": 400, "num_sentinels": 20}
    data = {"noise_density": 0.9} if request.param == "encoder" else {}  # any token may be a target
    config = small(model={"architecture": request.param, "num_layers": 1}, tokenizer=sizes, data=data)
    mesh = meshes.make_mesh(config, jax.devices()[:1])
    config, spec = auto.resolve_auto(config, mesh), pipeline.spec(config)
    params = drawn_params(config, spec)
    return Run(None, run_directory.Run(0, config, mesh, params, run.tokenizer))


def test_importing_the_package_imports_neither_jax_nor_numpy():
    source = "import sys, t5like; print(t5like.__all__, [name for name in ('jax', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout == "['Run', 'load'] []\n"
    with pytest.raises(AttributeError, match="no attribute 'generate'"):
        _ = t5like.generate
    members = {name for name in [*vars(Run), *Run.__annotations__] if not name.startswith("_")}
    assert len(members) + len(t5like.__all__) == 12


def test_generate_returns_a_text_or_a_list(run, command, trained):
    text = run.generate(TEXT, max_new_tokens=6)
    assert run.generate([TEXT, "ka"], max_new_tokens=6)[0] == text and run.generate([]) == []
    _, printed, _ = command("generate", f"--workdir={trained}", f"--prompt={TEXT}", "--max_new_tokens=6")
    assert printed == f"{text}\n"


def test_a_batch_is_that_of_the_pipeline_and_gives_the_loss_of_the_run(trained):
    run = t5like.load(trained, step=1)
    prepared = preparation.prepare(run.config)
    split = pipeline.open_split(run.config, prepared.stores, "train")
    expected = Batches(run.config, Vocabulary.of(prepared.tokenizer), split).at(1)
    batch = run.batch(2)
    for name, value in expected._asdict().items():
        np.testing.assert_array_equal(getattr(batch, name), value)
    loss = loss_of(run.config, run._params, batch, None).metrics["loss"].mean()
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    [logged] = [record["train/loss"] for record in records if record["step"] == 2 and "train/loss" in record]
    assert loss == pytest.approx(logged, rel=1e-5)  # of update 2, which begins with checkpoint 1


def test_logits_predict_what_greedy_decoding_generates(run):
    logits_LV = run.logits(TEXT, TARGET)
    encoder, decoder = run.tokens(TEXT, TARGET)
    assert logits_LV.shape == (len(decoder), 400) and logits_LV.dtype == np.float32
    assert encoder[-1] == "</s>" and decoder[1] == "<extra_id_0>" and len(run.logits(TEXT)) == 1
    first = run._generator.ids([run._generator.prompt(TEXT)], max_new_tokens=1)[0, 0]
    assert logits_LV[0].argmax() == first
    np.testing.assert_allclose(run.logits(TEXT)[0], logits_LV[0], atol=1e-5)  # it does not see the target


def test_intermediates_have_the_positions_of_the_tokens(run):
    values, (encoder, decoder) = run.intermediates(TEXT, TARGET), run.tokens(TEXT, TARGET)
    inputs, outputs = len(encoder), len(decoder)
    assert values.keys() == {f"{stack}/{name}" for stack in ("encoder", "decoder") for name in INTERMEDIATES} - {
        "encoder/cross_attention_weights",
        "encoder/cross_attention_output",
    }
    assert values["encoder/attention_weights"].shape == (1, 2, inputs, inputs)
    assert values["decoder/cross_attention_weights"].shape == (1, 2, outputs, inputs)
    assert values["decoder/attention_weights"].shape == (1, 2, outputs, outputs)
    assert values["encoder/residual"].shape == (1, inputs, 32) and values["decoder/mlp_hidden"].shape == (
        1,
        outputs,
        64,
    )
    for name, value in values.items():
        if name.endswith("_weights"):  # nothing is attended to in the padding, which is cut off
            np.testing.assert_allclose(value.sum(-1), 1, atol=1e-5)
    assert np.triu(values["decoder/attention_weights"], 1).max() == 0  # causal


def test_other_architectures_have_one_stack(untrained):
    architecture = untrained.config.model.architecture
    target = " fi" if architecture == "decoder" else ""
    encoder, decoder = untrained.tokens("ba de go", target)
    tokens = decoder if architecture == "decoder" else encoder
    assert not (encoder if architecture == "decoder" else decoder)
    logits_LV = untrained.logits("ba de go", target)
    ids_1L = np.array([[*untrained._generator.prompt("ba de go").ids, *untrained.tokenizer.encode(target)]], np.int32)
    one_1L = np.ones_like(ids_1L)
    batch = Batch(ids_1L, ids_1L, one_1L) if target else Batch(None, ids_1L, one_1L, ids_1L, one_1L)
    expected = loss_of(untrained.config, untrained._params, batch, None).metrics["loss"].mean()
    log_p_LV = logits_LV - np.logaddexp.reduce(logits_LV, axis=1, keepdims=True)
    assert len(tokens) == len(logits_LV) == ids_1L.shape[1]
    assert -log_p_LV[np.arange(len(tokens)), ids_1L[0]].mean() == pytest.approx(expected, rel=1e-4)
    if architecture == "encoder":
        with pytest.raises(
            errors.ConfigError, match=r"^target='x' needs a decoder, and this model has none; leave it out$"
        ):
            untrained.logits("ba", "x")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda run: run.batch(0), "step=0 must be a whole number of at least 1: the first update is 1; use 1"),
        (lambda run: run.generate("a", temperature=-1), "--temperature=-1 must be"),
        (lambda run: run.generate([1]), "prompt=1 must be a text, or a list of texts"),
        (lambda run: run.logits(b"a"), "text=b'a' must be a text"),
        (lambda run: run.intermediates("a", names=["attention"]), "intermediates=attention must be one of residual, "),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(run, call, message):
    with pytest.raises(errors.ConfigError) as refused:
        call(run)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_a_directory_without_a_run_is_refused(tmp_path, trained):
    with pytest.raises(errors.CheckpointError, match="holds no run"):
        t5like.load(tmp_path)
    with pytest.raises(errors.CheckpointError, match="7"):
        t5like.load(trained, step=7)
    with pytest.raises(errors.ConfigError, match="^step=-1 must be a whole number of at least 0, or None"):
        t5like.load(trained, step=-1)
    with pytest.raises(errors.ConfigError, match="^workdir="):
        t5like.load("a\0b")


def test_the_notebook_runs(trained, tmp_path, monkeypatch, capsys):
    notebook = json.loads((ROOT / "docs/notebook.ipynb").read_text("utf-8"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/tiny").symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    names: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec("".join(cell["source"]), names)  # noqa: S102, the cells of our own notebook
    assert len(names["axes"][0]) == 2 and names["axes"][0][0].images
    assert "after '<pad>'" in capsys.readouterr().out
