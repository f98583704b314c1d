"""The config section `distill`: the loss contains the predictions of a trained model, the teacher.

Hinton et al. 2015 (arXiv:1503.02531, section 2); for language models Sanh et al. 2019 (DistilBERT, arXiv:1910.01108).
"""

import dataclasses
from typing import Annotated

from t5like.config.field_types import LARGEST, NotNegative, Range


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    # Run directory of the teacher: a trained model of the same architecture, whose tokenizer the run uses. Empty: no
    # distillation. Each step computes the teacher's logits for its batch.
    teacher: str = ""
    # step of the teacher's checkpoint; -1: the newest one when the run begins, whose number its config.json contains
    teacher_step: Annotated[int, Range(-1, LARGEST)] = -1
    # Weight of the distillation loss, temperature^2 x KL(teacher || model) in nats per target. The data's loss (cross
    # entropy with label smoothing, z-loss) has 1 - weight.
    weight: Annotated[float, Range(above=0, most=1)] = 0.5
    temperature: Annotated[float, Range(1e-2, 1e3)] = 1.0  # both models' logits are divided by it
    # The most likely tokens of the teacher that are compared one by one; all others count as one token with the sum of
    # their probabilities. 0: all tokens are compared.
    top_k: NotNegative = 0
