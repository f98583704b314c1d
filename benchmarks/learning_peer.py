"""The PyTorch process of `learning.py`: one run of nanoT5's or Hugging Face's recipe on rows and weights from files.

Needs torch, transformers and numpy, and nothing of t5like. The recipes:

* nanot5 (Nawrot 2023, arXiv:2309.02373, github.com/PiotrNawrot/nanoT5): AdamW whose steps are scaled by the RMS of each
  parameter, learning rate 0.02, betas 0.9 and 0.999, epsilon 1e-6, no weight decay, gradient norm at most 1. Linear
  warm-up from half of the rate in the first eighth of the steps (1,666 of 13,333 in its four-hour recipe), then a
  cosine to 1e-5.
* huggingface (`run_t5_mlm_flax.py` with the flags of its README): Adafactor scaled by the parameter, learning rate
  0.005, weight decay 0.001, no momentum, no clipping of the gradient. Linear warm-up, then linear to 0. The README has
  2,000 warm-up steps of a run over a corpus; here they are a tenth of the steps.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from learning import intervals, report, steps_within
from torch_peer import t5_1_1
from transformers.optimization import Adafactor


class AdamWScale(torch.optim.Optimizer):
    """AdamW without decay whose step is multiplied by max(0.001, RMS of the parameter), as in nanoT5."""

    def __init__(self, params, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:
        """One update."""
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state.update(count=0, first=torch.zeros_like(param), second=torch.zeros_like(param))
                state["count"] += 1
                state["first"].lerp_(param.grad, 1 - b1)
                state["second"].mul_(b2).addcmul_(param.grad, param.grad, value=1 - b2)
                correction = math.sqrt(1 - b2 ** state["count"]) / (1 - b1 ** state["count"])
                scale = max(1e-3, float(param.norm()) / math.sqrt(param.numel()))
                size = group["lr"] * correction * scale
                param.addcdiv_(state["first"], state["second"].sqrt().add_(group["eps"]), value=-size)


def nanot5_rate(step: int, steps: int) -> float:
    """Learning rate of nanoT5's update after `step` others."""
    warmup = max(1, round(steps * 1666 / 13_333))
    if step < warmup:
        return 0.02 * (0.5 + 0.5 * step / warmup)
    progress = (step - warmup) / max(1, steps - warmup)
    return 1e-5 + (0.02 - 1e-5) * (1 + math.cos(math.pi * progress)) / 2


def huggingface_rate(step: int, steps: int) -> float:
    """Learning rate of the flax script's update after `step` others; the first one is not 0, which would do nothing."""
    warmup = max(1, round(steps / 10))
    return 0.005 * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def make_model(shape: dict) -> torch.nn.Module:
    """T5 1.1 with the shape of t5like's model: gated GELU, untied head, no dropout."""
    if shape["tied_embeddings"] or shape["mlp"] != "gated_gelu" or shape["positions"] != "relative":
        raise SystemExit("learning_peer.py: the config's model must be a T5 1.1, with an untied head")
    return t5_1_1(
        vocab_size=shape["vocab_size"],
        d_model=shape["model_dim"],
        d_kv=shape["head_dim"],
        d_ff=shape["mlp_dim"],
        num_layers=shape["num_layers"],
        num_decoder_layers=shape["num_decoder_layers"] or shape["num_layers"],
        num_heads=shape["num_heads"],
        relative_attention_num_buckets=shape["relative_buckets"],
        relative_attention_max_distance=shape["relative_max_distance"],
        layer_norm_epsilon=shape["norm_epsilon"],
    ).train()


class Run:
    """A model, its recipe and its rows."""

    def __init__(self, options: argparse.Namespace):
        self._shape = json.loads((options.files / "model.json").read_text(encoding="utf-8"))
        self._rows, self._heldout, self._weights = (
            {name: torch.from_numpy(array) for name, array in np.load(options.files / f"{file}.npz").items()}
            for file in ("train", "heldout", "weights")
        )
        self._recipe, self._model = options.recipe, make_model(self._shape)
        self._forward = self._model if options.eager else torch.compile(self._model)
        self.most_steps = len(self._rows["inputs"]) // self._shape["rows"]

    def start(self, steps: int) -> None:
        """Begin from the initial weights."""
        missing, unexpected = self._model.load_state_dict(self._weights, strict=False)
        copies = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}  # of shared.weight
        if unexpected or set(missing) - copies:
            raise SystemExit(f"learning_peer.py: weights {unexpected} and {missing} have no counterpart")
        self._steps, self._step = steps, 0
        params = self._model.parameters()
        self._optimizer = (
            AdamWScale(params, 0.02)
            if self._recipe == "nanot5"
            else Adafactor(params, 0.005, weight_decay=0.001, relative_step=False)
        )

    def train(self, count: int) -> None:
        """Make `count` updates."""
        rate = nanot5_rate if self._recipe == "nanot5" else huggingface_rate
        for _ in range(count):
            self._optimizer.param_groups[0]["lr"] = rate(self._step, self._steps)
            self._optimizer.zero_grad(set_to_none=True)
            begin = self._step * self._shape["rows"]
            self._loss(self._rows, slice(begin, begin + self._shape["rows"]), self._forward).backward()
            if self._recipe == "nanot5":
                torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
            self._optimizer.step()
            self._step += 1

    @torch.no_grad()
    def evaluate(self) -> float:
        """Nats per held-out target token."""
        size, weights = self._shape["rows"], self._heldout["weights"]
        total = 0.0
        for begin in range(0, len(weights), size):
            part = slice(begin, begin + size)
            if tokens := float(weights[part].sum()):
                total += tokens * float(self._loss(self._heldout, part, self._model))
        return total / float(weights.sum())

    def _loss(self, rows: dict, part: slice, model) -> torch.Tensor:
        labels = rows["targets"][part].long().masked_fill(rows["weights"][part] == 0, -100)
        return model(
            input_ids=rows["inputs"][part].long(), decoder_input_ids=rows["decoder"][part].long(), labels=labels
        ).loss


def main(arguments: list[str]) -> None:
    """Make one run."""
    parser = argparse.ArgumentParser(description="PyTorch's side of learning.py.")
    parser.add_argument("--recipe", choices=["nanot5", "huggingface"], required=True)
    parser.add_argument("--seed", type=int, required=True, help="of the files; nothing here is random")
    parser.add_argument("--steps", type=int, default=0, help="0: as many as fit into --minutes")
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--files", type=Path, required=True)
    options = parser.parse_args(arguments)
    run = Run(options)
    run.start(1000)
    run.train(3)  # compiles
    steps = options.steps
    if not steps:
        begin = time.process_time()
        run.train(10)
        steps = steps_within(options.minutes, (time.process_time() - begin) / 10)
    if steps > run.most_steps:
        raise SystemExit(f"learning_peer.py: {steps:,} steps need more rows than {run.most_steps:,}: raise SPARE")
    run.start(steps)
    spent = 0.0
    for before, after in intervals(steps):
        begin = time.process_time()
        run.train(after - before)
        spent += time.process_time() - begin
        report(options, after, spent, run.evaluate())


if __name__ == "__main__":
    main(sys.argv[1:])
