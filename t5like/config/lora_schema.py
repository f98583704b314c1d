"""The fields of the section `lora`: low-rank adapters of a model whose own weights stay as they are.

LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1): a kernel W is used as W + scale * A B, with A [inputs, rank] drawn
at random and B [rank, outputs] zero, so that training begins at the model of `init_from.checkpoint`. Only A and B are
trained and saved.
"""

import dataclasses
import math
from typing import Annotated, Literal

from t5like.config.field_types import Range


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    # Rank of the adapters; 0: no adapters, all parameters are trained. The weights of init_from.checkpoint stay
    # unchanged, and checkpoints contain the adapters only.
    rank: Annotated[int, Range(0, 2**14)] = 0
    alpha: Annotated[float, Range(above=0, most=1e6)] = 16.0  # an adapter's output is multiplied by alpha / rank
    # Whether it is multiplied by alpha / sqrt(rank) instead (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732).
    rank_stabilized: bool = False
    # Kernels of the layers that have an adapter, as regular expressions of their names, such as
    # .*/attention/(query|value)/kernel
    targets: tuple[str, ...] = (".*",)
    # Parameters that are trained whole and saved besides the adapters, as regular expressions of their names. Heads
    # of values, scores and labels always are.
    trained: tuple[str, ...] = ()
    # How the unchanged weights are kept in memory. bfloat16: kernels, embeddings and head, without the last 16 bits.
    # int8: kernels of the layers as whole numbers of -127 to 127 with one factor for each output, the rest bfloat16.
    base_dtype: Literal["float32", "bfloat16", "int8"] = "float32"

    @property
    def scale(self) -> float:
        """The factor of the adapters' outputs."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)
