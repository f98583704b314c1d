"""Every objective on every architecture that takes it: 12 steps of the trainer's own step, and a first step as stored.

The golden file holds the loss and gradient norm of one step. If they differ, either the change is a bug, or numerics
changed on purpose: then run `python tests/optim/test_learning.py` and say so in CHANGELOG.md under "Numerics".
"""

import json
import sys
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import pytest
from conftest import begun, small, vocabulary_of

from t5like.config.schema import ARCHITECTURES, LabelObjective
from t5like.data.pipeline import Batches, spec
from t5like.optim import step, train_state
from t5like.sharding import auto, placement
from t5like.sharding import mesh as meshes
from t5like.types import host_metrics

GOLDEN = Path(__file__).parents[1] / "golden" / "first_steps.json"
PAIRS = [  # labels: tests/evaluation/test_label_eval.py
    (objective, architecture)
    for objective, takes in ARCHITECTURES.items()
    if objective not in get_args(LabelObjective)
    for architecture in takes
]


class Text:
    """A text with a rule: documents of 40 tokens, each counting up from its own number in steps of three."""

    num_tokens, num_documents = 40 * 200, 200

    def tokens(self, places):
        return (3 + (places // 40 * 7 + places % 40 * 3) % 120).astype(np.int32)

    def windows(self, starts_N, length):
        return self.tokens((starts_N[:, None] + np.arange(length)) % self.num_tokens)

    def segments(self, starts_N, length):
        documents = (starts_N[:, None] + np.arange(length)) // 40
        return (documents - documents[:, :1] + 1).astype(np.int32)

    def documents(self, places_N):
        begin_N = places_N % self.num_tokens // 40 * 40
        return begin_N, begin_N + 39

    def gather(self, starts_N, lengths_N):
        return np.concatenate([self.tokens(s + np.arange(n)) for s, n in zip(starts_N, lengths_N, strict=True)])


class Examples:
    """Supervised examples on that text: 7 to 16 tokens are read, the 5 behind them are learned."""

    def __init__(self, architecture):
        self.stream, number = Text(), np.arange(200)
        self.begin_N = number * 40
        self.cut_N = self.begin_N + 7 + number % 10
        self.end_N = self.cut_N + 5
        self.targets_M2 = np.stack([self.cut_N, self.end_N], axis=1)
        self.first_N, self.count_N = number, np.ones(200, np.int64)
        lengths = [self.cut_N - self.begin_N, self.end_N - self.cut_N]
        self.lengths_NC = np.stack([sum(lengths)] if architecture == "decoder" else lengths, axis=1)

    def __len__(self):
        return 200


MODERNBERT = {
    "num_layers": 2,
    "positions": "rotary",
    "rotary": {"base": 1000.0, "local_base": 100.0},
    "layer_pattern": ("global", "local"),
    "attention_window": 5,
    "norm": "layer",
    "norm_bias": False,
    "embedding_norm": True,
    "first_attention_norm": False,
    "biases": False,
    "mlp": "gated_gelu_exact",
    "tied_embeddings": True,
    "scale_attention": True,
    "init": "gpt2",
}


def train(objective: str, architecture: str, steps: int, model=None, data=None, optimizer=None):
    """The metrics of each step."""
    heads = {"positions": "learned", "head": "mlm", "biases": True} if architecture == "encoder" else {}
    config = small(
        model={"architecture": architecture, "num_layers": 1, **heads, **(model or {})},
        tokenizer={"vocab_size": 500, "num_sentinels": 64},
        data={"objective": objective, "inputs_length": 66, "targets_length": 64, "batch_size": 16, **(data or {})},
        optimizer={"learning_rate": 1e-2, **(optimizer or {})},
    )
    mesh = meshes.make_mesh(config, jax.devices()[:1])
    config = auto.resolve_auto(config, mesh)
    stream = Examples(architecture) if objective == "supervised" else Text()
    batches = Batches(config, vocabulary_of(config), [stream])
    abstract = train_state.abstract_state(config, spec(config), mesh)
    state, jitted = begun(config, spec(config), abstract), step.jit_train_step(config, abstract)
    found = []
    with jax.set_mesh(mesh):
        for number in range(steps):
            state, values = jitted(state, placement.to_global(batches.at(number), mesh, 16))
            found.append(host_metrics(jax.device_get(values)))
    return found


@pytest.mark.parametrize("objective, architecture", PAIRS)
def test_the_first_step_of_an_objective_equals_the_golden_and_the_loss_falls(objective, architecture):
    found = train(objective, architecture, 12)
    golden = json.loads(GOLDEN.read_text())[f"{objective} {architecture}"]
    why = "a bug, or run `python tests/optim/test_learning.py` and note the change in CHANGELOG.md under Numerics"
    assert {name: found[0][name] for name in golden} == pytest.approx(golden, rel=2e-4), why
    assert np.mean([each["loss"] for each in found[-3:]]) < found[0]["loss"] - 0.5


def test_an_encoder_like_modernbert_learns_with_stable_adamw_while_fewer_tokens_are_masked():
    data = {"phase_boundaries": (10, 20), "phase_noise_density": (0.3, 0.15, 0.05)}
    optimizer = {"name": "stable_adamw", "clip_norm": 0.0, "schedule": "constant", "warmup_steps": 0}
    found = train("mlm", "encoder", 30, MODERNBERT, data, optimizer)
    assert np.mean([each["loss"] for each in found[-5:]]) < found[0]["loss"] - 1


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder"])
def test_packed_rows_do_not_depend_on_the_process_and_an_epoch_has_each_example_once(architecture):
    config = small(
        model={"architecture": architecture},
        data={"objective": "supervised", "inputs_length": 33, "targets_length": 15, "batch_size": 8},
    )
    batches = Batches(config, vocabulary_of(config), [Examples(architecture)])
    whole = [batches.at(number) for number in range(2 * int(batches.num_rows[0]) // 8)]
    for processes in (2, 4):
        size = 8 // processes
        parts = [batches.at(3, np.arange(size * p, size * p + size)) for p in range(processes)]
        for together, field in zip(zip(*parts, strict=True), whole[3], strict=True):
            assert field is None or (np.concatenate(together) == field).all()
    segments = np.concatenate([batch.decoder_segments_BL for batch in whole])[: int(batches.num_rows[0])]
    assert segments.max(1).sum() == 200 and segments.max() > 1


def test_examples_of_two_sources_are_mixed_at_their_rates():
    data = {"objective": "supervised", "inputs_length": 33, "targets_length": 15, "batch_size": 512}
    config = small(data={**data, "source": ("jsonl:a", "jsonl:b"), "rates": (3, 1)})
    batches = Batches(config, vocabulary_of(config), [Examples("encoder_decoder")] * 2)
    found = np.concatenate([batches.at(number).component_B1[:, 0] for number in range(8)])
    assert np.bincount(found).tolist() == [3072, 1024]
    kinds = [None if field is None else (field.shape, field.dtype) for field in spec(config)]
    assert kinds == [None if field is None else (field.shape, field.dtype) for field in batches.at(3)]


if __name__ == "__main__":
    kept = {}
    for pair in PAIRS:
        [values] = train(*pair, 1)
        kept[" ".join(pair)] = {
            name: values[name] for name in ("loss", "grad_norm", "tokens", "nsp_loss") if name in values
        }
    GOLDEN.write_text(json.dumps(kept, indent=1) + "\n")
    sys.exit(0)
