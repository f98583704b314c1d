"""Compares the logits of an exported directory in transformers, in a separate process, with those of t5like."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from t5like.config.model_schema import ModelConfig
from t5like.config.schema import Config
from t5like.errors import CheckpointError
from t5like.interop.huggingface import label_heads
from t5like.model.transformer import Transformer
from t5like.types import Batch, Tree

TOLERANCE = 1e-4  # in float32, absolute and relative to the largest logit
ROWS, LENGTH = 2, 24  # of the compared texts; the second text is shorter


def compare(directory: Path, config: Config, params: Tree) -> str:
    """Compare logits on random tokens with padding, and return a line with the result, or why there is none.

    Args:
        directory: the export.
        config: resolved.
        params: the parameters as written in the export.

    Raises:
        CheckpointError: the logits differ, or transformers can't load the directory.
    """
    absent = [name for name in ("transformers", "torch") if importlib.util.find_spec(name) is None]
    if absent:
        return f"{absent[0]} is not installed: logits not compared"
    inputs = example(config)
    with tempfile.TemporaryDirectory() as folder:
        inputs_file, logits_file = Path(folder) / "inputs.npz", Path(folder) / "logits.npz"
        np.savez(inputs_file, **inputs)
        command = [
            sys.executable,
            "-m",
            "t5like.interop.huggingface.reference_logits",
            label_heads.TASKS.get(config.data.label_objective) or task_of(config.model),
            str(directory),
            str(inputs_file),
            str(logits_file),
        ]
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        process = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", errors="replace")
        if process.returncode:
            last = (process.stderr.strip() or "no message").splitlines()[-1]
            raise CheckpointError(f"transformers can't run the export: {last}")
        reference = dict(np.load(logits_file))
    version = str(reference.pop("version"))
    largest = 0.0
    for name, logits in t5like_logits(config, params, inputs).items():
        is_token = inputs["decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask"] > 0
        pair = logits, reference[name]
        if name == "logits" and logits.ndim == 3:  # of tokens, not of texts
            pair = tuple(x[..., : config.tokenizer.vocab_size][is_token] for x in pair)
        difference = float(np.abs(pair[0] - pair[1]).max())
        if not difference <= TOLERANCE * max(1.0, float(np.abs(pair[0]).max())):
            raise CheckpointError(f"{name} differ from transformers {version} by {difference:.1e}; please report this")
        largest = max(largest, difference)
    return f"logits equal those of transformers {version} (largest difference {largest:.0e})"


def task_of(model: ModelConfig) -> str:
    """The AutoModelFor class of transformers with the heads of the model; `architectures` may name another class."""
    if model.architecture == "encoder":
        return "PreTraining" if model.has_next_sentence_head else "MaskedLM"
    return "Seq2SeqLM" if model.architecture == "encoder_decoder" else "CausalLM"


def example(config: Config) -> dict[str, np.ndarray]:
    """Random tokens under transformers' argument names, the second row padded on the right."""
    rng, model = np.random.default_rng(0), config.model
    length = min(LENGTH, model.longest_text)
    lowest = int(config.tokenizer.decoder_start_id > 0)  # 0 then stands for another id
    draw = lambda length: rng.integers(lowest, config.tokenizer.vocab_size, (ROWS, length))
    mask = np.ones((ROWS, length), np.int64)
    mask[1, length * 2 // 3 :] = 0
    inputs = {"input_ids": draw(length), "attention_mask": mask}
    if model.token_types:
        inputs["token_type_ids"] = np.minimum(np.arange(length)[None] * 2 // length, model.token_types - 1) + 0 * mask
    if model.architecture == "encoder_decoder":
        inputs |= {"decoder_input_ids": draw(length // 2), "decoder_attention_mask": mask[:, ::2][:, : length // 2]}
    return inputs


def t5like_logits(config: Config, params: Tree, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The logits of t5like on the same tokens, in float32."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32"))
    ids, segments = inputs["input_ids"].astype(np.int32), inputs["attention_mask"].astype(np.int32)
    ones = np.ones(ids.shape, np.float32)
    if config.model.architecture == "encoder_decoder":
        decoder = inputs["decoder_input_ids"].astype(np.int32)
        decoder_segments = inputs["decoder_attention_mask"].astype(np.int32)
        batch = Batch(decoder, decoder, np.ones(decoder.shape, np.float32), ids, segments, decoder_segments)
    elif config.model.architecture == "encoder":
        types = inputs["token_type_ids"].astype(np.int32) if config.model.token_types else None
        batch = Batch(None, ids, ones, ids, segments, token_types_BS=types)
    else:
        batch = Batch(ids, ids, ones, decoder_segments_BL=segments)

    @jax.jit
    def run(params):
        apply = lambda **options: Transformer(config).apply({"params": params}, **options)
        logits = {"logits": apply(batch=batch)}
        if objective := config.data.label_objective:
            return logits if objective == "token_classification" else {"logits": logits["logits"][:, 0]}
        if config.model.has_next_sentence_head:
            logits["pair_logits"] = apply(
                batch=batch, method=lambda model, batch: model.pair_logits(model.hidden(batch).x_BLD)
            )
        return logits

    return {name: np.asarray(value) for name, value in run(params).items()}
