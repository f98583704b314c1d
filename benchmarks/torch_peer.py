"""The PyTorch process of `peers.py`: training steps of `transformers`' T5, Llama or BERT on request.

Needs torch and transformers and nothing of t5like's dependencies. Random weights and tokens, fused AdamW, autocast for
bfloat16, defaults of the library otherwise. `measurement.serve` implements the protocol.
"""

import argparse
import sys
import time
from collections.abc import Callable

import measurement
import torch
from peers import SHAPES, Shape
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForPreTraining,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)


def t5(shape: Shape) -> torch.nn.Module:
    """The T5 1.1 of a shape."""
    return t5_1_1(
        vocab_size=shape.vocabulary,
        d_model=shape.model_dim,
        d_kv=64,
        d_ff=shape.mlp_dim,
        num_layers=shape.layers,
        num_heads=shape.heads,
    )


def t5_1_1(**sizes: float) -> torch.nn.Module:
    """T5 1.1 with these fields of `T5Config`: gated GELU, untied head, no dropout."""
    config = T5Config(
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        pad_token_id=0,
        use_cache=False,
        **sizes,
    )
    model = T5ForConditionalGeneration(config)
    # transformers 5 reads tie_word_embeddings=False as unscaled logits, but ties the head anyway.
    model.lm_head = torch.nn.Linear(config.d_model, config.vocab_size, bias=False)
    return model


def llama(shape: Shape) -> torch.nn.Module:
    """Llama: rotary positions, gated SiLU, RMS norm, untied head."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.model_dim,
            intermediate_size=shape.mlp_dim,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=getattr(shape, "kv_heads", shape.heads),
            max_position_embeddings=shape.targets,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )


def bert(shape: Shape, model: Callable[[BertConfig], torch.nn.Module] = BertForPreTraining) -> torch.nn.Module:
    """BERT; by default with the heads for masked tokens and sentence pairs."""
    return model(
        BertConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.model_dim,
            intermediate_size=shape.mlp_dim,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            max_position_embeddings=shape.inputs,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def model_and_batch(shape: Shape) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model of a shape, and one batch of random tokens."""
    draw = lambda length: torch.randint(3, shape.vocabulary, (shape.rows, length))
    if shape.inputs and shape.targets:
        return t5(shape), {"input_ids": draw(shape.inputs), "labels": draw(shape.targets)}
    if shape.targets:
        tokens = draw(shape.targets)
        return llama(shape), {"input_ids": tokens, "labels": tokens}
    reads, pairs = draw(shape.inputs), torch.zeros(shape.rows, dtype=torch.int64)
    labels = torch.where(torch.rand(reads.shape) < 0.15, reads, -100)  # -100: no loss
    types = (torch.arange(shape.inputs) >= shape.inputs // 2).long().expand(reads.shape)
    rest = {"attention_mask": torch.ones_like(reads), "token_type_ids": types, "next_sentence_label": pairs}
    return bert(shape), {"input_ids": reads, "labels": labels} | rest


class Trainer:
    """A model, its optimizer and one batch."""

    def __init__(self, options: argparse.Namespace):
        torch.manual_seed(0)
        self.model, self._batch = model_and_batch(SHAPES[options.shape])
        self.model.train()
        if options.optimizer == "adamw":
            self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
        else:
            self._optimizer = torch.optim.Adafactor(self.model.parameters(), lr=1e-4)
        self._bfloat16 = options.dtype == "bfloat16"
        self._forward = torch.compile(self.model) if options.compile else self.model

    def step(self) -> float:
        """One update; the loss."""
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._bfloat16):
            loss = self._forward(**self._batch).loss
        loss.backward()
        self._optimizer.step()
        return loss.item()

    def run(self, count: int) -> list[float]:
        """Seconds of each of `count` steps."""
        return [timed(self.step)[0] for _ in range(count)]


def timed(function: Callable[[], float]) -> tuple[float, float]:
    """Seconds, and the result."""
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, result


def matmul_gflops() -> float:
    """FLOP/s of float32 matmuls on this machine, measured as `metrics.measure_matmul_rate` does for JAX."""
    size = 2048
    matrix = torch.ones(size, size)
    return 2e-9 * size**3 / min(timed(lambda: matrix @ matrix)[0] for _ in range(20))


def main(arguments: list[str]) -> None:
    """Train a model of one shape; one step per request."""
    parser = argparse.ArgumentParser(description="PyTorch's side of peers.py.")
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--optimizer", choices=["adamw", "adafactor"], default="adamw")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args(arguments)
    trainer = Trainer(options)
    first, loss = timed(trainer.step)
    start_to_first_step = measurement.since_start()
    measurement.emit(
        **measurement.machine("torch", "transformers"),
        threads=torch.get_num_threads(),
        attention=trainer.model.config._attn_implementation,
    )
    again, _ = timed(trainer.step)
    measurement.emit(
        start_to_first_step_s=start_to_first_step,
        compile_s=first - again if options.compile else None,
        params=sum(p.numel() for p in trainer.model.parameters()),
        loss=loss,
    )
    measurement.serve(trainer.run)
    memory, counted = measurement.peak_memory_mb(), None
    if not options.compile:  # the FLOP counter does not see a compiled graph
        with FlopCounterMode(display=False) as counter:
            trainer.step()
        counted = counter.get_total_flops()
    measurement.emit(peak_rss_mb=memory, counted_flops=counted, matmul_gflops=matmul_gflops())


if __name__ == "__main__":
    main(sys.argv[1:])
