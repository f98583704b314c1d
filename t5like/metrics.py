"""What a run reports: its speed against the hardware's, and the files its values go to.

Used by `train`. What the values are is up to the caller; device sums become floats in `types.host_metrics`. Names:
``train/loss``, ``train/accuracy``, ``train/grad_norm``, ``train/learning_rate``, ``train/tokens_per_second``,
``train/step_seconds``, ``train/mfu`` and ``train/fill`` (shares, 0 to 1; fill: of the places that hold tokens),
``eval/loss``, ``eval/accuracy``, ``eval/perplexity``, ``eval/bits_per_byte``, ``baseline/uniform``,
``baseline/unigram``, those of `by_component`, and the scores of `answers`.

Sources: FLOPs and MFU as in Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, appendix B), after Kaplan et al. 2020
(arXiv:2001.08361, section 2.1): matrix products only, a training step is three forward passes, and recomputation
(remat) counts as time, not as work.
"""

import contextlib
import functools
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from t5like.config import Config
from t5like.errors import CheckpointError, DataError
from t5like.strict_json import loads
from t5like.types import COMPONENT_METRICS, Metrics

FILE = "metrics.jsonl"  # in a run directory
LINE = b'{"step": '  # how each of its lines begins
TENSORBOARD = "tensorboard"


# ---- Work and speed ----


def model_flops(config: Config) -> int:
    """Floating-point operations of the matrix products in one training step of the whole batch.

    A product of [m, k] and [k, n] is 2 m k n. Per row, with S input and L target tokens (decoder-only: L is the row;
    encoder-only: S is the row, and the head reads all of it, L = S):

        | per encoder layer          |                                 | per decoder layer | with an encoder  |
        |----------------------------|---------------------------------|-------------------|------------------|
        | query and output kernels   | 2 * 2 S D N H                   | 2 * 2 L D N H     | + 2 * 2 L D N H  |
        | key and value kernels      | 2 * 2 S D K H                   | 2 * 2 L D K H     | + 2 * 2 S D K H  |
        | scores and weighted values | 2 * 2 S S N H                   | 2 * 2 L L N H     | + 2 * 2 L S N H  |
        | MLP                        | 2 * 2 S D F, gated: 3 * 2 S D F | the same with L   |                  |

    and once 2 L D V for the head, V with its padding rows. The MLM head has 2 S D D more, for its dense layer. Pooler
    and classes have 2 D D + 2 * 2 D, for the first token, if an objective has pairs. The backward pass is twice the
    forward pass. Conventions: attention counts all pairs of tokens, also those that a causal or segment mask removes;
    looking embeddings up is free, token types included; so are norms, softmax, biases and the optimizer.
    """
    model, data = config.model, config.data
    queries = model.num_heads * model.head_dim
    keys = (model.num_kv_heads or model.num_heads) * model.head_dim
    mlp_kernels = 3 if model.mlp.startswith("gated") else 2

    def attention(num_queries: int, num_keys: int) -> int:
        projections = num_queries * model.model_dim * queries + num_keys * model.model_dim * keys
        return 4 * (projections + num_queries * num_keys * queries)

    def layer(length: int) -> int:
        return attention(length, length) + mlp_kernels * 2 * length * model.model_dim * model.mlp_dim

    heads = 0
    if model.architecture == "decoder":
        targets = config.row_length
        layers = model.num_layers * layer(targets)
    elif model.architecture == "encoder":
        targets = data.inputs_length
        layers = model.num_layers * layer(targets)
        heads += 2 * targets * model.model_dim**2 if model.head == "mlm" else 0
        heads += 2 * model.model_dim**2 + 2 * 2 * model.model_dim if "mlm_nsp" in data.objective else 0
    else:
        targets = data.targets_length
        decoder_layer = layer(targets) + attention(targets, data.inputs_length)
        layers = model.num_layers * layer(data.inputs_length)
        layers += (model.num_decoder_layers or model.num_layers) * decoder_layer
    heads += 2 * targets * model.model_dim * config.vocab_rows
    return 3 * data.batch_size * (layers + heads)


# FLOP/s of one JAX device, bf16 without sparsity, by words of its device_kind (the longest entry that occurs counts).
# TPU: cloud.google.com/tpu/docs, "peak compute per chip", halved where a JAX device is half a chip (v2, v3, 7x).
# GPU: NVIDIA's data sheets, tensor core bf16; where they give the sparse figure only, half of it.
PEAK_FLOPS = {
    "TPU v2": 46e12 / 2,
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p calls itself so
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    "A30": 165e12,
    "A100": 312e12,
    "L4": 121e12,
    "L40S": 362e12,
    "H100": 989e12,  # SXM
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "GH200": 989e12,
    "H200": 989e12,  # SXM
    "H200 NVL": 835e12,
    "B200": 2250e12,  # HGX
    "GB200": 2500e12,
}


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """FLOP/s that the devices could do together, for the MFU; None if a kind is not in the table.

    On accelerators that is their bf16 peak, whatever the dtype of the run, so that MFUs compare. CPU devices share
    one machine, however many they are: they count once, with the float32 rate that is measured on it.
    """
    if all(device.platform == "cpu" for device in devices):
        return measure_matmul_rate()
    peaks = [_peak(device.device_kind) for device in devices]
    return None if None in peaks else sum(peaks)


def _peak(kind: str) -> float | None:
    if re.search(r"\bMIG\b", kind):  # a slice of a GPU carries the name of the whole
        return None
    found = [name for name in PEAK_FLOPS if re.search(rf"\b{name}\b", kind, re.IGNORECASE)]
    return PEAK_FLOPS[max(found, key=len)] if found else None


@functools.cache
def measure_matmul_rate() -> float:
    """FLOP/s of this machine's CPU in float32 matrix products, the best of a few; takes half a second, once."""
    size = 2048
    matrix = jax.device_put(jnp.ones((size, size), jnp.float32), jax.local_devices(backend="cpu")[0])
    product = jax.jit(lambda a: a @ a).lower(matrix).compile()
    best, begin = math.inf, time.perf_counter()
    while time.perf_counter() - begin < 0.3:
        start = time.perf_counter()
        product(matrix).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


class Throughput:
    """Times completed steps: tokens per second, seconds per step, MFU and the time left.

    The first step compiles and is not counted. `tick` comes when a step's values have arrived on the host, so read what
    is in flight before a `pause`.
    """

    def __init__(self, flops_per_step: float, peak: float | None, *, clock: Callable[[], float] = time.monotonic):
        """Start with `model_flops` and `peak_flops` of the whole run, not of this process; clock: in seconds."""
        self._flops_per_step, self._peak, self._clock = flops_per_step, peak, clock
        self._first: float | None = None  # when the first step was done
        self._steps = 0  # since then
        self._interval_steps = 0  # since the last `read`, as are the next three
        self._begin = self._tokens = self._paused = 0.0

    def tick(self, tokens: float) -> None:
        """Count one completed step with so many tokens, padding not among them, over all processes."""
        if self._first is None:
            self._first = self._begin = self._clock()
            return
        self._steps += 1
        self._interval_steps += 1
        self._tokens += tokens

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Keep what happens inside (evaluation, checkpoints) out of the speed; it does count for the time left."""
        start = self._clock()
        try:
            yield
        finally:
            if self._first is not None:
                self._paused += self._clock() - start

    def read(self) -> dict[str, float]:
        """The values since the last call, by metric name; none before a step has been timed."""
        if not self._interval_steps:
            return {}
        now = self._clock()
        seconds = max(now - self._begin - self._paused, 1e-9) / self._interval_steps
        tokens = self._tokens / self._interval_steps
        values = {"train/tokens_per_second": tokens / seconds, "train/step_seconds": seconds}
        if self._peak is not None:
            values["train/mfu"] = self._flops_per_step / seconds / self._peak
        self._interval_steps, self._begin, self._tokens, self._paused = 0, now, 0.0, 0.0
        return values

    def seconds_left(self, steps_left: int) -> float | None:
        """How long the run will take, pauses included at their share so far; None before a step has been timed."""
        return (self._clock() - self._first) / self._steps * steps_left if self._steps else None


def by_component(
    prefix: str, names: Sequence[Mapping[str, str]], sums: Metrics, bytes_C: np.ndarray | None = None
) -> dict[str, float]:
    """Loss, learned tokens and share of the rows, for each source, objective and denoiser that is named.

    Args:
        prefix: "train" or "eval".
        names: `pipeline.component_names`.
        sums: `types.COMPONENT_METRICS` as numpy arrays [components].
        bytes_C: UTF-8 bytes of each component's targets; adds perplexity and bits per byte to each loss.

    Returns:
        ``train/loss/objective/ul2``, ``train/tokens/denoiser/X3_50``, ``train/share/source/wiki``, ...; a loss
        only where something was learned; bits per byte only where its targets are text.
    """
    nats, rows = (sums[name] for name in COMPONENT_METRICS)
    values = {}
    for kind in names[0]:
        for name in dict.fromkeys(each[kind] for each in names):
            mine = np.array([each[kind] == name for each in names])
            if weight := float(nats.weight[mine].sum()):
                total = float(nats.total[mine].sum())
                values[f"{prefix}/loss/{kind}/{name}"] = total / weight
                if bytes_C is not None:
                    values[f"{prefix}/perplexity/{kind}/{name}"] = perplexity(total / weight)
                    if size := float(bytes_C[mine].sum()):
                        values[f"{prefix}/bits_per_byte/{kind}/{name}"] = total / math.log(2) / size
            values[f"{prefix}/tokens/{kind}/{name}"] = weight
            values[f"{prefix}/share/{kind}/{name}"] = float(rows.total[mine].sum() / rows.total.sum())
    return values


def perplexity(nats: float) -> float:
    """exp of a loss, and a large number instead of an overflow."""
    return math.exp(min(nats, 700.0))


# ---- Files ----


def read(workdir: Path) -> list[dict[str, float | None]]:
    """The lines of a run's metrics.jsonl; no file is no lines. A line that was cut off while being written is left out.

    Raises:
        DataError: another line is no JSON object with a step and numbers.
        CheckpointError: the file can't be read.
    """
    path = workdir / FILE
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}; move it away") from None
    cut_off = LINE.startswith(rest[: len(LINE)]) or (lines and not rest.strip(b"\0"))  # zeros: the machine crashed
    records = [_record(line) for line in (lines if cut_off else [*lines, rest])]
    if None in records:
        number = records.index(None) + 1
        raise DataError(
            f"{path}:{number} must be a JSON object with a step and numbers; delete that line, or move the file away"
        )
    return records


def _record(line: bytes) -> dict[str, float | None] | None:
    """A line's values; None if it is not what `Writer` writes."""
    try:
        record = loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    fits = lambda value: value is None or type(value) is float or (type(value) is int and abs(value) < 2**63)
    return record if all(map(fits, record.values())) else None


class Writer:
    """Writes values to metrics.jsonl and to TensorBoard events, in the run directory, from one process.

    Each line is ``{"step": 20, "train/loss": 4.81}``. A value that is not finite is null there, which JSON can say and
    NaN is not; TensorBoard gets it as it is. On resume both forget what came after the resumed step, and a value that
    the file already has for that very step is not written again: each name occurs once per step.
    """

    def __init__(self, workdir: Path, *, step: int = 0, primary: bool = True):
        """Open the files of a run that continues after `step` updates; unless primary, nothing is ever written."""
        self._file = self._events = None
        if not primary:
            return
        import tensorboardX  # 0.2 s, and only here

        kept = [record for record in read(workdir) if record["step"] <= step]
        self._known = {(step, name) for record in kept if record["step"] == step for name in record}
        self._step = step
        text = "".join(json.dumps(record) + "\n" for record in kept)
        path = workdir / FILE
        with _writing(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.read_bytes() != text.encode():
                replace(path, text.encode())
            self._file = path.open("a", buffering=1, encoding="utf-8")  # each line goes out whole, at once
            self._events = tensorboardX.SummaryWriter(
                str(workdir / TENSORBOARD), purge_step=step + 1, flush_secs=10, filename_suffix=f".{step}"
            )  # names have whole seconds: a quick restart must not overwrite the last file

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add one line. Steps must not go back."""
        if self._file is None:
            return
        assert step >= self._step, f"step {step} after {self._step}"
        self._step = step
        values = {name: float(value) for name, value in values.items() if (step, name) not in self._known}
        if not values:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush both files; nothing can be written after it."""
        if self._file is not None:
            self._file.close()
            self._events.close()


def replace(path: Path, content: bytes) -> None:
    """Give a file new content so that no reader, and no crash, ever finds half of it.

    Raises:
        CheckpointError: it can't be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with _writing(path):
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        name = error.filename2 or error.filename or path
        raise CheckpointError(f"{name} can't be written: {error.strerror or error}; move it away") from None
