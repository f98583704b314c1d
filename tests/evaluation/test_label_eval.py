"""Runs that predict labels, through the command line: they learn, are scored, and write predictions and embeddings."""

import json

import numpy as np
import pytest

import t5like
from t5like.checkpoint.run_directory import Run
from t5like.cli import encoder_files
from t5like.config.model_schema import ModelConfig
from t5like.config.schema import Config
from t5like.errors import ConfigError
from t5like.evaluation.label_metrics import entities

BERT = {
    "model.norm": "layer", "model.norm_position": "post", "model.embedding_norm": "true", "model.biases": "true",
    "model.tied_embeddings": "true", "model.scale_attention": "true", "model.mlp": "gelu_exact", "model.head": "mlm",
    "model.token_types": 2, "model.init": "bert",
}  # fmt: skip
WORDS = {"PER": ["alma", "bert"], "LOC": ["delta", "gamma"], "": ["sees", "asks", "with"]}


def example(rng) -> dict:
    """A text of words: its class, a number, and a label for each word, all of which can be read from the words."""
    kinds = rng.choice(["PER", "LOC", ""], rng.integers(2, 6)).tolist()
    labels = [f"{'I' if index and kinds[index - 1] == kind else 'B'}-{kind}" for index, kind in enumerate(kinds)]
    return {
        "text": [str(rng.choice(WORDS[kind])) for kind in kinds],
        "plain": "",
        "class": "people" if kinds[0] == "PER" else "places" if kinds[0] == "LOC" else "none",
        "count": kinds.count("PER") / 2,
        "labels": [label if kind else "O" for label, kind in zip(labels, kinds, strict=True)],
    }


@pytest.fixture(scope="module")
def texts_file(tmp_path_factory):
    rng = np.random.default_rng(0)
    records = [example(rng) for _ in range(600)]
    path = tmp_path_factory.mktemp("labels") / "texts.jsonl"
    path.write_text("".join(json.dumps({**each, "plain": " ".join(each["text"])}) + "\n" for each in records))
    return path


@pytest.fixture
def label_run(command, flags, texts_file, tmp_path):
    """Train on these texts; returns the run directory and the metrics."""

    def run(objective: str, target: str, labels: str = "", steps: int = 40, **more):
        inputs = "{text}" if objective == "token_classification" else "{plain}"
        values = {
            "data.source": f"jsonl:{texts_file}", "data.objective": objective, "data.inputs_template": inputs,
            "data.targets_template": target, "data.labels": labels, "tokenizer.vocab_size": 300,
            "model.architecture": "encoder", "model.positions": "learned", "model.max_length": 64,
            "train.num_steps": steps, **more,
        }  # fmt: skip
        settings = [f"--config.{field}={value}" for field, value in values.items() if value != ""]
        code, _, err = command("train", *flags, f"--workdir={tmp_path}/run", *settings)
        assert code == 0, err
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        return tmp_path / "run", [json.loads(line) for line in lines]

    return run


def predicted(command, workdir, texts, tmp_path) -> list[dict]:
    (tmp_path / "in.txt").write_text("".join(f"{text}\n" for text in texts))
    code, out, err = command("predict", f"--workdir={workdir}", f"--inputs={tmp_path}/in.txt")
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


def test_a_classifier_learns_predicts_lines_and_gives_embeddings(label_run, command, refused, tmp_path):
    metrics = {"evaluate.metrics": "accuracy,macro_f1,matthews", "model.pooling": "mean"}
    workdir, records = label_run("classification", "{class}", "people,places,none", **metrics)
    scores = [record for record in records if "eval/score/matthews" in record]
    assert records[0]["baseline/majority/accuracy"] < 50 and records[0]["baseline/majority/matthews"] == 0
    assert scores[-1]["eval/score/accuracy"] > 85 and scores[-1]["eval/score/matthews"] > 70
    assert scores[-1]["eval/accuracy"] == pytest.approx(scores[-1]["eval/score/accuracy"] / 100)  # all are scored
    texts = ["alma asks gamma", "delta sees bert with alma sees", "with gamma"]
    rows = predicted(command, workdir, texts, tmp_path)
    assert [row["label"] for row in rows] == ["people", "places", "none"] and [row["text"] for row in rows] == texts
    run = t5like.load(workdir)
    assert run.predict(texts) == [{key: row[key] for key in ("label", "probabilities")} for row in rows]
    assert sum(rows[0]["probabilities"].values()) == pytest.approx(1)
    # ---- Embeddings: mean over the tokens of each text ----
    code, _, err = command("embed", f"--workdir={workdir}", f"--inputs={tmp_path}/in.txt", f"--output={tmp_path}/e.npy")
    assert code == 0, err
    vectors = np.load(tmp_path / "e.npy")
    alone = np.concatenate([run.embed([text] * 4)[:1] for text in texts])  # four rows have the program of three
    assert vectors.shape == (3, 32) and np.allclose(vectors, alone, atol=1e-5)
    for wrong in (3, ("a", "b", "c"), ["a"]):
        with pytest.raises(ConfigError, match="must be a text, or a pair of texts"):
            run.embed([wrong])
    with pytest.raises(ConfigError, match="this model reads one text"):
        run.predict([("a", "b")])
    # ---- What such a model can't do ----
    assert refused("generate", f"--workdir={workdir}", "--prompt=x") == (
        2, "data.objective=classification: this model predicts labels, not text; use t5like predict",
    )  # fmt: skip
    code, message = refused("export", "--format=hf", f"--workdir={workdir}", f"--output={tmp_path}/hf")
    assert code == 4 and "model.pooling=mean has no class in transformers, which reads the first token" in message
    code, message = refused("predict", f"--workdir={workdir}", f"--inputs={tmp_path}/none")
    assert code == 3 and "none can't be read" in message
    (tmp_path / "long.txt").write_text("alma " * 70 + "\n")
    code, message = refused("predict", f"--workdir={workdir}", f"--inputs={tmp_path}/long.txt")
    assert code == 2 and "line 1: text=" in message and "more than model.max_length=64; shorten it" in message


def test_a_decoder_has_no_embeddings_whatever_the_texts_are(tmp_path):
    run = Run(0, Config(model=ModelConfig(architecture="decoder")), None, {}, None)
    with pytest.raises(ConfigError, match=r"^model.architecture=decoder has no encoder; use a run with one"):
        encoder_files.embed(run, tmp_path / "absent.txt", tmp_path / "e.npy")


def test_a_regression_learns_numbers(label_run, command, tmp_path):
    workdir, records = label_run("regression", "{count}", steps=60, **BERT, **{"evaluate.metrics": "pearson,spearman"})
    last = [record for record in records if "eval/score/spearman" in record][-1]
    assert last["eval/loss"] < records[0]["baseline/mean"] / 2 and last["eval/score/spearman"] > 70
    lines = (workdir / "predictions" / "60.jsonl").read_text().splitlines()
    pairs = np.array([[float(json.loads(line)[name]) for name in ("prediction", "target")] for line in lines])
    assert last["eval/score/pearson"] == pytest.approx(100 * np.corrcoef(pairs.T)[0, 1], abs=0.01)
    assert last["eval/loss"] == pytest.approx(np.square(pairs[:, 0] - pairs[:, 1]).mean(), rel=1e-3)
    code, out, err = command("export", "--format=hf", f"--workdir={workdir}", f"--output={tmp_path}/hf")
    assert code == 0 and "read again, equal step 60 bit for bit" in out, err
    exported = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert exported["architectures"] == ["BertForSequenceClassification"] and exported["problem_type"] == "regression"


def test_words_are_labelled_each(label_run, command, tmp_path):
    labels = "O,B-PER,I-PER,B-LOC,I-LOC"
    settings = {"evaluate.metrics": "accuracy,entity_f1"}
    workdir, records = label_run("token_classification", "{labels}", labels, **settings)
    last = [record for record in records if "eval/score/entity_f1" in record][-1]
    assert last["eval/score/accuracy"] > 80 and last["eval/score/entity_f1"] > 60
    [row, empty] = predicted(command, workdir, ["alma bert sees delta", ""], tmp_path)
    assert len(row["labels"]) == 4 and empty["labels"] == []
    assert [kind for _, _, kind in entities(row["labels"])] == ["PER", "LOC"]
