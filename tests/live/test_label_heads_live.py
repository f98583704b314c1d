"""Exports of models that predict labels: their logits are those of transformers, which `export` compares itself."""

import json

import pytest
from test_hf_live import transformers_here

BERT = {
    "model.architecture": "encoder", "model.positions": "learned", "model.max_length": 64, "model.norm": "layer",
    "model.norm_position": "post", "model.embedding_norm": "true", "model.biases": "true", "model.init": "bert",
    "model.tied_embeddings": "true", "model.scale_attention": "true", "model.mlp": "gelu_exact", "model.head": "mlm",
    "model.token_types": 2, "train.num_steps": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    "objective, labels, name",
    [
        ("classification", "yes,no,perhaps", "BertForSequenceClassification"),
        pytest.param("token_classification", "O,B-X,I-X", "BertForTokenClassification", marks=pytest.mark.long),
    ],
)
def test_logits_of_labels_equal_those_of_transformers(objective, labels, name, command, flags, tmp_path, monkeypatch):
    transformers_here(monkeypatch)
    rows = [{"inputs": f"word {number} and more", "targets": labels.split(",")[number % 3]} for number in range(60)]
    if objective == "token_classification":
        rows = [{**row, "targets": [row["targets"]] * 4} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        **BERT, "data.objective": objective, "data.labels": labels, "data.source": f"jsonl:{tmp_path}/rows.jsonl",
        "tokenizer.vocab_size": 302, "data.cache_directory": tmp_path / "cache",
    }  # fmt: skip
    settings = [f"--config.{field}={value}" for field, value in values.items()]
    code, _, err = command("train", *flags, f"--workdir={tmp_path}/run", *settings)
    assert code == 0, err
    code, out, err = command("export", "--format=hf", f"--workdir={tmp_path}/run", f"--output={tmp_path}/hf")
    assert code == 0 and "logits equal those of transformers" in out, err
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == [name]
