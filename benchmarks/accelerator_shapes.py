"""What `accelerator.py` measures: models with their batches, the parts of a run with their time limits, and its goals.

Standard library only: the processes of both libraries and the report import it.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from measurement import UPDATE

T = TypeVar("T")
CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and its batch. Field names are those of `peers.Shape`, so that `torch_peer` builds a model from it."""

    config: str  # file of configs/
    model_dim: int
    layers: int  # of the encoder and of the decoder each
    heads: int
    kv_heads: int
    mlp_dim: int
    vocabulary: int
    inputs: int  # 0: decoder-only
    targets: int  # 0: encoder-only
    rows: int  # of the first attempt
    head_dim: int = 64

    @property
    def row_tokens(self) -> int:
        """Positions of a row."""
        return self.inputs + self.targets


SHAPES = {
    "t5_base": Shape("t5_base.py", 768, 12, 12, 12, 2048, 32_128, 512, 114, 128),
    "t5_large": Shape("t5_large.py", 1024, 24, 16, 16, 2816, 32_128, 512, 114, 64),
    "t5_xl": Shape("t5_xl.py", 2048, 24, 32, 32, 5120, 32_128, 512, 114, 64),
    "llama_1b": Shape("llama_1b.py", 2048, 22, 32, 4, 5632, 32_000, 0, 2048, 16),
    "bert_base": Shape("bert_base.py", 768, 12, 12, 12, 3072, 30_592, 512, 0, 128),
}
TOY_SIZES = {"model_dim": 128, "layers": 1, "heads": 2, "mlp_dim": 64, "vocabulary": 384, "rows": 4}
LEAST_ROWS = 4


def toy(shape: Shape) -> Shape:
    """A model of the same kind that a CPU trains in milliseconds: it shows that everything runs."""
    kv_heads = 1 if shape.kv_heads < shape.heads else 2
    lengths = {"inputs": min(shape.inputs, 32), "targets": min(shape.targets, 16)}
    return dataclasses.replace(shape, kv_heads=kv_heads, **TOY_SIZES, **lengths)


class Attempt(NamedTuple):
    """Rows of a batch, and what the backward pass recomputes."""

    rows: int
    remat: str  # none | full


def attempts(rows: int, first: Attempt | None = None) -> list[Attempt]:
    """Batches in the order in which they are tried: halved down to `LEAST_ROWS`; then the same with recomputation.

    `first`: begin with it.
    """
    halves = [rows]
    while halves[-1] // 2 >= LEAST_ROWS:
        halves.append(halves[-1] // 2)
    listed = [Attempt(count, remat) for remat in ("none", "full") for count in halves]
    return listed[listed.index(first) :] if first in listed else listed


class DoesNotFit(Exception):
    """No batch fits in the memory of the device."""


def first_that_fits(tries: list[Attempt], run: Callable[[Attempt], T], is_full: Callable[[Exception], bool]) -> T:
    """Run the attempts until one fits.

    Args:
        tries: in order.
        run: of one attempt.
        is_full: whether an exception of `run` says that memory is exhausted. Other exceptions are raised.

    Raises:
        DoesNotFit: the memory does not suffice for any of them.
    """
    for attempt in tries:
        try:
            return run(attempt)
        except Exception as error:
            if not is_full(error):
                raise
    smallest = tries[-1]
    raise DoesNotFit(f"{smallest.rows} rows with remat={smallest.remat} do not fit in the device's memory")


def fields(shape: Shape, attempt: Attempt, dtype: str, kernels: str = "auto") -> list[tuple[str, str]]:
    """Config fields of a shape: AdamW without dropout, clipping, z-loss, as in `peers.py`, on one device."""
    values: dict[str, Any] = {
        "tokenizer.vocab_size": shape.vocabulary,
        "data.batch_size": attempt.rows,
        "data.inputs_length": shape.inputs,
        "data.targets_length": shape.targets or shape.inputs,
        "model.model_dim": shape.model_dim,
        "model.num_layers": shape.layers,
        "model.num_heads": shape.heads,
        "model.num_kv_heads": shape.kv_heads,
        "model.head_dim": shape.head_dim,
        "model.mlp_dim": shape.mlp_dim,
        "model.dtype": dtype,
        "model.remat": attempt.remat,
        "model.kernels": kernels,
        "model.dropout_rate": 0,
        "optimizer.name": "adamw",
        **UPDATE,
        "mesh.data": 1,
        "mesh.fsdp": 1,
    }
    if not shape.targets:  # as BertForMaskedLM
        values |= {"data.objective": "mlm", "model.next_sentence_head": "false"}
        values |= {"model.max_length": shape.inputs}
    return [(name, str(value)) for name, value in values.items()]


# ---- Parts ----


class Part(NamedTuple):
    """What one process measures in one go."""

    name: str
    program: str  # t5like | torch
    seconds: float  # its limit in a run of 8 minutes

    @property
    def title(self) -> str:
        """Its name in the results."""
        return self.name if self.program == "t5like" else f"{self.name} in PyTorch"


# In the order in which they run: what is wrong shows first, and what is most important is measured before the others.
LIMITS = {
    "attention_values": (100, 0),  # limits in seconds: t5like, PyTorch; 0: there is no such part
    "loss_curve": (80, 0),
    "matmul": (40, 30),
    "attention_speed": (90, 0),
    "t5_base": (90, 120),
    "llama_1b": (90, 120),
    "t5_large": (90, 90),
    "t5_xl": (100, 100),
    "bert_base": (60, 60),
    "decoding": (90, 60),
}
PEER_SHARE = 0.4  # of the time is kept for PyTorch


def parts(names: list[str], *, torch: bool) -> Iterator[Part]:
    """The parts of these names: first all of t5like, then those of PyTorch."""
    for index, program in enumerate(("t5like", "torch") if torch else ("t5like",)):
        for name, seconds in LIMITS.items():
            if name in names and seconds[index]:
                yield Part(name, program, seconds[index])


# ---- Goals ----

MFU_GOALS = {"t5_base": 0.55, "t5_large": 0.55, "t5_xl": 0.55, "llama_1b": 0.60}  # of the bf16 peak
PEER_GOAL = 1.3  # tokens/s over those of compiled PyTorch
CUDNN_GOAL = 0.7  # rate of the attention kernel with its bias over cuDNN's
