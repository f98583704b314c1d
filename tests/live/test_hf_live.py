"""Imports from and exports to transformers: logits, losses and generated texts are equal.

`make parity` installs torch and transformers and runs this; `make test` does not (goldens stand in for them).
"""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
import transformers
from conftest import SYLLABLES

from t5like import tree
from t5like.checkpoint import run_directory
from t5like.inference.generate import Generator
from t5like.inference.prompt_format import Prompt
from t5like.inference.sampling import DecodingOptions
from t5like.interop.huggingface import logits_check, reference_logits, safetensors_files, tokenizer_files
from t5like.interop.huggingface.convert import import_run
from t5like.metrics import writers
from t5like.optim import losses

IDS = 400
T5 = {"d_model": 16, "d_kv": 6, "d_ff": 24, "num_heads": 4, "num_layers": 1, "dropout_rate": 0.0}
T5 |= {"relative_attention_max_distance": 20, "decoder_start_token_id": 0}
DECODER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
DECODER |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 1}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
LENGTHS = {"rope_theta": 1e4, "original_max_position_embeddings": 12}  # shorter than the texts
BERT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
GEMMA = {**DECODER, "num_hidden_layers": 2, "head_dim": 6, "sliding_window": 6, "query_pre_attn_scalar": 5}
STACK = {**GEMMA, "vocab_size": IDS, "bos_token_id": 2, "pad_token_id": 0}
VISION = {"model_type": "siglip_vision_model", "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 1, "image_size": 16, "patch_size": 1}
TYPES = {"layer_types": ["sliding_attention", "full_attention"]}
MODELS = {  # name: class, settings, whether it gets its own head
    "t5_1_0": ("T5ForConditionalGeneration", {**T5}, False),
    "t5_1_1": (  # with more layers in the decoder than in the encoder transformers 5.24 can't generate
        "T5ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu", "num_layers": 2, "num_decoder_layers": 1},
        True,
    ),
    "mt5": ("MT5ForConditionalGeneration", T5, True),
    "umt5": ("UMT5ForConditionalGeneration", {**T5, "num_layers": 2}, False),
    "llama": ("LlamaForCausalLM", {**DECODER, "rope_parameters": {**LLAMA3, **LENGTHS}, "head_dim": 16}, False),
    "llama_tied": (
        "LlamaForCausalLM",
        {**DECODER, "tie_word_embeddings": True, "rope_parameters": {**YARN, **LENGTHS}, "head_dim": 16},
        False,
    ),
    "qwen3": ("Qwen3ForCausalLM", {**DECODER, "head_dim": 8}, False),
    "mistral": ("MistralForCausalLM", {**DECODER, "sliding_window": 6}, False),
    "gemma2": ("Gemma2ForCausalLM", GEMMA, False),
    "gemma3": ("Gemma3ForCausalLM", {**GEMMA, **TYPES}, False),
    "t5gemma": (
        "T5GemmaForConditionalGeneration",
        {"encoder": {**STACK, "hidden_size": 24}, "decoder": {**STACK, "intermediate_size": 20}},
        False,
    ),
    "t5gemma2": (
        "T5Gemma2ForConditionalGeneration",
        {"encoder": {"text_config": {**STACK, **TYPES}, "vision_config": VISION}, "decoder": {**STACK, **TYPES}},
        False,
    ),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 64, "eos_token_id": 1}, False),
    "bert": ("BertForPreTraining", {**BERT, "max_position_embeddings": 64}, False),
    "bert_alone": ("BertForMaskedLM", {**BERT, "max_position_embeddings": 64}, False),
    "modernbert": (  # 11 keys in a window, and the pattern does not repeat evenly
        "ModernBertForMaskedLM",
        {**BERT, "num_hidden_layers": 4, "local_attention": 10, "cls_token_id": 3, "sep_token_id": 1},
        False,
    ),
    "eurobert": ("EuroBertForMaskedLM", {**BERT, "num_key_value_heads": 2, "mask_token_id": 3}, False),
}


@pytest.fixture(scope="module")
def tokenizer(trained):
    return run_directory.load(trained).tokenizer


def hf_model_of(name: str, place: Path, tokenizer) -> torch.nn.Module:
    """A random model of transformers, saved with a tokenizer of t5like."""
    kind, settings, own_head = MODELS[name]
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(vocab_size=IDS, pad_token_id=0, **settings))
    if own_head:  # transformers 5 only takes one from files
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
        model.config.tie_word_embeddings = False
        if hasattr(model.config, "scale_decoder_outputs"):
            model.config.scale_decoder_outputs = False
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    model.save_pretrained(place)
    tokenizer_files.write(tokenizer, place, family=model.config.model_type, max_length=64)
    return cls.from_pretrained(place).eval()


def loss_of(logits: np.ndarray, targets: np.ndarray, real: np.ndarray) -> float:
    total = losses.cross_entropy(logits, targets, real.astype(np.float32), vocab_size=IDS).metrics["loss"]
    return float(total.total / total.weight)


@pytest.mark.parametrize("name", MODELS)
def test_an_imported_model_computes_the_same(name, tokenizer, tmp_path):
    model = hf_model_of(name, tmp_path / "hf", tokenizer)
    list(import_run(tmp_path / "hf", tmp_path / "run"))
    loaded = run_directory.load(tmp_path / "run")
    inputs = logits_check.example(loaded.config)
    logits = logits_check.t5like_logits(loaded.config, loaded.params, inputs)
    tensors = {key: torch.from_numpy(value) for key, value in inputs.items()}
    real = inputs.get("decoder_attention_mask", inputs["attention_mask"]) > 0
    targets = np.roll(inputs.get("decoder_input_ids", inputs["input_ids"]), -1, axis=1)
    labels = np.where(real, targets, -100)
    if "decoder_input_ids" not in inputs and "bert" not in name:  # decoders shift labels themselves
        labels = np.where(real, inputs["input_ids"], -100)
        learned = real & np.append(real[:, 1:], np.zeros((2, 1), bool), axis=1)
    else:
        learned = real
    with torch.no_grad():
        pairs = {"next_sentence_label": torch.zeros(2, dtype=torch.long)} if name == "bert" else {}
        output = model(**tensors, labels=torch.from_numpy(labels), **pairs)
    hf_logits = output.prediction_logits if name == "bert" else output.logits
    np.testing.assert_allclose(logits["logits"][real], hf_logits.numpy()[real], atol=1e-4)
    loss = loss_of(logits["logits"], targets, learned)
    if name == "bert":
        np.testing.assert_allclose(logits["pair_logits"], output.seq_relationship_logits.numpy(), atol=1e-4)
        margin = logits["pair_logits"][:, 1] - logits["pair_logits"][:, 0]
        loss += float(np.log1p(np.exp(margin)).mean())
    assert loss == pytest.approx(float(output.loss), abs=1e-4)
    if "bert" in name:
        return
    prompt = inputs["input_ids"][0]
    generated = model.generate(torch.from_numpy(prompt[None]), max_new_tokens=8, do_sample=False, eos_token_id=1)[0]
    generated = generated[1:] if model.config.is_encoder_decoder else generated[len(prompt) :]
    generator = Generator(loaded.config, loaded.params, loaded.tokenizer)
    ids = generator.ids([Prompt(prompt.tolist())], max_new_tokens=8)[0]
    assert ids[: len(generated)].tolist() == generated.tolist() and not ids[len(generated) :].any()


@pytest.mark.parametrize("name", ["t5_1_0", "llama"])
def test_texts_end_at_any_of_several_ids_in_both(name, tokenizer, tmp_path):
    model = hf_model_of(name, tmp_path / "hf", tokenizer)
    prompt = np.random.default_rng(1).integers(3, IDS, (1, 9))
    skip = 1 if model.config.is_encoder_decoder else prompt.shape[1]
    generate = lambda **how: model.generate(torch.from_numpy(prompt), max_new_tokens=8, do_sample=False, **how)[
        :, skip:
    ]
    free = [beam.tolist() for beam in generate(eos_token_id=None, num_beams=3, num_return_sequences=3)]
    model.generation_config.eos_token_id = [1, free[0][2], free[1][4], free[2][5]]
    model.save_pretrained(tmp_path / "hf")
    list(import_run(tmp_path / "hf", tmp_path / "run"))
    loaded = run_directory.load(tmp_path / "run")
    generator = Generator(loaded.config, loaded.params, loaded.tokenizer)
    assert set(generator.eos_ids) == set(model.generation_config.eos_token_id)
    for beams in (1, 3):
        decoding = DecodingOptions(8, num_beams=beams, num_returned=beams)
        beams_t5like = [answer.ids for answer in generator.answer([Prompt(prompt[0].tolist())], decoding)[0]]
        beams_hf = [text.tolist() for text in generate(num_beams=beams, num_return_sequences=beams)]
        assert any(len(ids) < 8 for ids in beams_t5like)
        assert [text[: len(ids)] for text, ids in zip(beams_hf, beams_t5like, strict=True)] == beams_t5like
        assert all(
            set(text[len(ids) :]) <= {0, *generator.eos_ids} for text, ids in zip(beams_hf, beams_t5like, strict=True)
        )


RUNS = {
    "t5": {},
    "llama": {
        "model.architecture": "decoder",
        "data.objective": "causal_lm",
        "model.positions": "rotary",
        "model.mlp": "gated_silu",
        "model.scale_attention": "true",
        "model.init": "gpt2",
    },
    "bert": {
        "model.architecture": "encoder",
        "data.objective": "mlm_nsp",
        "model.positions": "learned",
        "model.mlp": "gelu_exact",
        "model.norm": "layer",
        "model.norm_position": "post",
        "model.embedding_norm": "true",
        "model.biases": "true",
        "model.tied_embeddings": "true",
        "model.head": "mlm",
        "model.token_types": "2",
        "model.scale_attention": "true",
        "model.init": "bert",
    },
}


def transformers_here(monkeypatch):
    """`export` compares logits as it does, but transformers runs in this process: to import it takes 10 s of CPU."""

    def run(command, **_):
        assert command[1:3] == ["-m", reference_logits.__name__]
        reference_logits.main(*command[3:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(logits_check, "subprocess", SimpleNamespace(run=run))


@pytest.mark.parametrize("family", RUNS)
def test_a_run_trained_here_on_eight_devices_speaks_there_as_here_and_comes_back(
    family, flags, tmp_path, command, monkeypatch
):
    if family != "t5":  # T5's is another process
        transformers_here(monkeypatch)
    changes = [f"--config.{name}={value}" for name, value in RUNS[family].items()]
    mesh = [
        "--config.mesh.fsdp=2",
        "--config.mesh.tensor=2",
        "--config.train.num_steps=4",
        "--config.train.eval_batches=1",
        "--fake_devices=8",
    ]
    code, _, err = command("train", *flags, *changes, *mesh, f"--workdir={tmp_path}/run")
    assert code == 0, err
    code, out, err = command("export", "--format=hf", f"--workdir={tmp_path}/run", f"--output={tmp_path}/out")
    assert code == 0, err
    assert f"logits equal those of transformers {transformers.__version__}" in out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == family
    loaded = run_directory.load(tmp_path / "run")
    generator = Generator(loaded.config, loaded.params, loaded.tokenizer)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = " ".join(SYLLABLES[:3]) + " <extra_id_0>" * (family != "llama")
    if family == "bert":
        model = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "out").eval()
        ids = tokenizer.encode(prompt, return_tensors="pt")
        with torch.no_grad():
            guess = model(ids).prediction_logits.argmax(-1)
        filled = torch.where(ids == tokenizer.mask_token_id, guess, ids)[0, 1:-1]
        assert tokenizer.decode(filled) == generator([prompt])[0]
    else:
        auto = transformers.AutoModelForSeq2SeqLM if family == "t5" else transformers.AutoModelForCausalLM
        model = auto.from_pretrained(tmp_path / "out")
        ids = tokenizer.encode(prompt, return_tensors="pt")
        generated = model.generate(ids, max_new_tokens=12)[0]
        generated = generated[1:] if family == "t5" else generated[ids.shape[1] :]
        text = tokenizer.decode([token for token in generated.tolist() if token > 1])  # without </s> and padding
        assert text == generator([prompt], max_new_tokens=12)[0]
    list(import_run(tmp_path / "out", tmp_path / "again"))  # and can be trained further
    imported = tree.flatten(run_directory.load(tmp_path / "again").params)
    for name, leaf in tree.flatten(loaded.params).items():
        leaf = leaf[:IDS] if name in ("embedding", "head_bias") else leaf[:, :IDS] if name == "head" else leaf
        np.testing.assert_array_equal(leaf, imported[name], strict=True)
    if family == "t5":
        code, out, err = command(
            "train", *flags, *mesh, "--config.model.vocab_multiple=400", f"--workdir={tmp_path}/again"
        )
        assert code == 0, err
        losses_of = lambda place: [x["eval/loss"] for x in writers.read(tmp_path / place) if "eval/loss" in x]
        assert "from the import" in out
        assert losses_of("again")[0] == pytest.approx(losses_of("run")[-1], rel=1e-5)
    assert all(tensor.dtype == "F32" for tensor in safetensors_files.tensors(tmp_path / "out").values())
    assert jax.tree.leaves(loaded.params)[0].dtype == np.float32
