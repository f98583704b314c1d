"""The types that modules pass to each other, and the legend of dimension letters.

    B batch (rows)          L query or target length    S key or source length (encoder)
    D model dim             F MLP dim                   V vocabulary rows
    N query heads           K key-value heads           H head dim
    Y stacked layers        R relative-position buckets T tokens of a window before an objective
    C classes               G samples per prompt

An array in the model, losses, objectives and generation ends in its logical shape: ``targets_BL``, ``bias_1NLS``.
The shape is logical: it does not change with the sharding. Nothing here imports JAX: named tuples are pytrees anyway.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Tree = Any  # a nested dict of arrays, or of anything with one leaf per array
LogicalAxes = Mapping[str, tuple[str | None, ...]]  # of every parameter, by name: one logical axis per dim
Array = Any  # np.ndarray on the host, jax.Array in a program, jax.ShapeDtypeStruct in a plan

MASKED = -1e9  # a score or logit whose softmax weight is 0, and which is finite in float32


class Batch(NamedTuple):
    """One training batch, the same type for every objective, so that the train step does not depend on the objective.

    The config alone determines which fields are None, never the data, so a step is traced once.

    Attributes:
        decoder_BL: int32 ids that the decoder reads; None for an encoder-only model.
        targets_BL: int32 ids to predict at each position of the decoder (encoder-only: of the encoder), or indices of
            labels; float32 numbers in regression.
        weights_BL: float32 loss weight of each target; 0: no loss.
        encoder_BS: int32 ids that the encoder reads; None for a decoder-only model.
        encoder_segments_BS: int32 document number inside a row, from 1; attention stays inside a document.
            None: the row is one document, nothing is masked. 0 is padding, which is masked everywhere.
        decoder_segments_BL: the same for the decoder.
        encoder_positions_BS: int32 position inside the document; None counts from 0 over the row.
        decoder_positions_BL: the same for the decoder.
        decoder_sources_BL: int32 segment of the encoder that each decoder position reads, where several segments of the
            decoder read one (answers to a prompt); None: that with its own number, `decoder_segments_BL`.
        prefix_BL: bool, True at decoder positions that are visible to all positions of the same document (prefix LM);
            None: plain causal attention.
        token_types_BS: int32 0 in the first and 1 in the second text of a pair (BERT); None: no pairs.
        follows_B1: int32 1 where the second text of a pair follows the first, 0 where it does not, -1 where the row
            does not count; None: no pairs.
        component_B1: int32 index in `pipeline.components` of the row's source and objective; None if there is only one.
    """

    decoder_BL: Array | None
    targets_BL: Array
    weights_BL: Array
    encoder_BS: Array | None = None
    encoder_segments_BS: Array | None = None
    decoder_segments_BL: Array | None = None
    encoder_positions_BS: Array | None = None
    decoder_positions_BL: Array | None = None
    prefix_BL: Array | None = None
    token_types_BS: Array | None = None
    follows_B1: Array | None = None
    component_B1: Array | None = None
    decoder_sources_BL: Array | None = None


class Taught(NamedTuple):
    """A batch with the parameters of a teacher (`optim.distillation`), which all rows share."""

    rows: Batch
    teacher: Tree


class Sum(NamedTuple):
    """A weighted sum: added across microbatches, devices and hosts, and divided once, when the mean is printed."""

    total: Array
    weight: Array

    def mean(self) -> float:
        """Return total / weight, or 0 if the weight is 0."""
        return float(self.total) / max(float(self.weight), 1e-30)


class Largest(NamedTuple):
    """The largest of values that are not negative, over microbatches, devices, hosts, and steps until it is printed."""

    value: Array

    def mean(self) -> float:
        """Return the value, under the name that `Sum` has for what is printed."""
        return float(self.value)


class TrainState(NamedTuple):
    """Everything that training changes; the arrays of a checkpoint.

    Attributes:
        step: int32 scalar, the number of completed updates of this run.
        params: float32 parameters.
        opt_state: the Optax state.
        ema: float32 moving average of the parameters, or None.
        recent: float32 [2, window], loss and gradient norm of recent updates (`optim.bad_steps`), or None.
        base: parameters of a LoRA run that are never trained nor saved (`optim.lora`); None: there are none.
    """

    step: Array
    params: Tree
    opt_state: Tree
    ema: Tree | None = None
    recent: Array | None = None
    base: Tree | None = None


Metrics = dict[str, Sum | Largest]


class Auxiliary(NamedTuple):
    """What a model returns besides its output, each by name: summed over layers, stacks and microbatches.

    Attributes:
        losses: their totals are added to the objective, so they are nats summed over tokens, as the objective is; each
            is also reported as a metric, total / weight. The sum of a router's load-balancing loss is an example.
        statistics: metrics only.
    """

    losses: Metrics
    statistics: Metrics

    def merged(self, other: "Auxiliary") -> "Auxiliary":
        """The sums of both; a name that both have is added."""

        def add(left: Metrics, right: Metrics) -> Metrics:
            both = {
                name: Sum(*(a + b for a, b in zip(left[name], right[name], strict=True)))
                for name in left.keys() & right.keys()
            }
            return {**left, **right, **both}

        return Auxiliary(add(self.losses, other.losses), add(self.statistics, other.statistics))


NO_AUXILIARY = Auxiliary({}, {})

# The metrics that are arrays [components] (`pipeline.components`): nats over targets, and rows over 1.
COMPONENT_METRICS = ("by_component", "rows_by_component")


def add_metrics(left: Metrics, right: Metrics, maximum: Callable[[Array, Array], Array] = np.maximum) -> Metrics:
    """Metrics of two parts as those of both; the names are those of `left`. `maximum` is JAX's for arrays of JAX."""

    def add(a: Sum | Largest, b: Sum | Largest) -> Sum | Largest:
        if isinstance(a, Largest):
            return Largest(maximum(a.value, b.value))
        return Sum(a.total + b.total, a.weight + b.weight)

    return {name: add(value, right[name]) for name, value in left.items()}


def host_metrics(metrics: Metrics) -> dict[str, float]:
    """Return each metric as a Python float (a `Sum` as its mean), without `COMPONENT_METRICS`."""
    return {
        name: type(value)(*map(np.asarray, value)).mean()
        for name, value in metrics.items()
        if name not in COMPONENT_METRICS
    }
