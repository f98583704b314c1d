"""FLOPs against hand counts and XLA's, files after kills and resumes, the clock, the lines, the picture."""

import dataclasses
import json
import re
import resource
import shutil
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5like.config.model_schema import ModelConfig
from t5like.config.schema import Config, DataConfig, TokenizerConfig
from t5like.errors import CheckpointError, DataError
from t5like.metrics import flops
from t5like.metrics.flops import model_flops, peak_flops
from t5like.metrics.loss_curve import draw_loss_curve
from t5like.metrics.throughput import Throughput
from t5like.metrics.writers import Writer, read

DATA = DataConfig(batch_size=2, inputs_length=5, targets_length=3)


def model_of(**changes) -> ModelConfig:
    sizes = {"num_layers": 2, "model_dim": 8, "num_heads": 4, "head_dim": 6, "mlp_dim": 16, "vocab_multiple": 128}
    return ModelConfig(**sizes | changes)


def config_of(**changes) -> Config:
    model = model_of(**changes)
    objective = {"decoder": "causal_lm", "encoder": "mlm"}.get(model.architecture, "span_corruption")
    data = dataclasses.replace(DATA, objective=(objective,))
    return Config(data=data, model=model, tokenizer=TokenizerConfig(vocab_size=1000))


def test_flops_of_an_encoder_decoder_equal_a_count_by_hand():
    # N H = 24; multiplications of one row: q + k + v + o, scores + values, MLP
    encoder = 4 * 5 * 8 * 24 + 2 * 5 * 5 * 24 + 3 * 5 * 8 * 16
    decoder = 4 * 3 * 8 * 24 + 2 * 3 * 3 * 24 + 3 * 3 * 8 * 16
    cross = (2 * 3 + 2 * 5) * 8 * 24 + 2 * 3 * 5 * 24
    head = 3 * 8 * 1024  # 1000 ids in rows of 128
    assert model_flops(config_of(mlp="gated_gelu")) == 2 * 3 * 2 * (2 * encoder + 2 * (decoder + cross) + head)


def test_flops_of_a_decoder_with_grouped_queries_equal_a_count_by_hand():
    # rows of 5 + 3 tokens; q and o are 8 x 24, k and v 8 x 12
    layer = 2 * 8 * 8 * 24 + 2 * 8 * 8 * 12 + 2 * 8 * 8 * 24 + 2 * 8 * 8 * 16
    wanted = 2 * 3 * 2 * (2 * layer + 8 * 8 * 1024)
    assert model_flops(config_of(architecture="decoder", num_kv_heads=2, mlp="relu")) == wanted


def test_flops_of_an_encoder_with_berts_heads_equal_a_count_by_hand():
    # rows of 20, of which 3 tokens are predicted: 15 % of 18 without CLS and SEP, or of 17 with two SEP
    data = dataclasses.replace(DATA, inputs_length=20, objective=("mlm",))
    with_data = lambda config, data=data: dataclasses.replace(config, data=data)
    layer = 4 * 20 * 8 * 24 + 2 * 20 * 20 * 24 + 2 * 20 * 8 * 16
    bert = with_data(config_of(architecture="encoder", mlp="gelu_exact", head="mlm", token_types=2))
    assert model_flops(bert) == 2 * 3 * 2 * (2 * layer + 3 * 8 * 8 + 3 * 8 * 1024)
    pairs = with_data(bert, dataclasses.replace(data, objective=("mlm_nsp",)))
    assert model_flops(pairs) - model_flops(bert) == 2 * 3 * 2 * (8 * 8 + 8 * 2)
    plain = with_data(config_of(architecture="encoder", mlp="gelu_exact"))
    assert model_flops(bert) - model_flops(plain) == 2 * 3 * 2 * 3 * 8 * 8


def test_flops_take_the_decoders_own_depth():
    one, three = (model_flops(config_of(num_decoder_layers=n)) for n in (1, 3))
    assert one < model_flops(config_of(num_decoder_layers=0)) == (one + three) // 2


def test_flops_of_windows_merged_attention_and_another_decoder_equal_a_count_by_hand():
    windows = {"attention_window": 2, "layer_pattern": ("local", "global")}
    full, local = (model_flops(config_of(**fields)) for fields in ({}, windows))
    # one encoder layer of two: 3 keys instead of 5; one decoder layer: 2 keys instead of 3
    assert full - local == 2 * 3 * 2 * 2 * 24 * (5 * (5 - 3) + 3 * (3 - 2))
    merged = model_flops(config_of(merged_attention=True))
    assert full - merged == 2 * 3 * 2 * 2 * (2 * 3 * 8 * 24)  # no q and o of cross-attention in two layers
    sizes = {"decoder_model_dim": 4, "decoder_num_heads": 2, "decoder_num_kv_heads": 1, "decoder_mlp_dim": 6}
    encoder = 2 * (4 * 5 * 8 * 24 + 2 * 5 * 5 * 24 + 3 * 5 * 8 * 16)
    # q and o twice, own k and v, those of the encoder's output, scores and values, MLP
    decoder = 4 * 3 * 4 * 12 + 2 * 3 * 4 * 6 + 2 * 5 * 8 * 6 + 2 * 3 * (3 + 5) * 12 + 3 * 3 * 4 * 6
    small = config_of(**sizes, separate_embeddings=True, mlp="gated_gelu")
    assert model_flops(small) == 2 * 3 * 2 * (encoder + 2 * decoder + 3 * 4 * 1024)


def test_flops_of_a_forward_pass_are_those_that_xla_counts():
    def decoder(x, q, k, v, o, up, down, head):
        split = lambda y: y.reshape(2, 8, 4, 6)  # noqa: E731
        scores = jnp.einsum("blnh,bsnh->bnls", split(x @ q), split(x @ k))
        x = jnp.einsum("bnls,bsnh->blnh", scores, split(x @ v)).reshape(2, 8, 24) @ o
        return x @ up @ down @ head

    shapes = (2, 8, 8), (8, 24), (8, 24), (8, 24), (24, 8), (8, 16), (16, 8), (8, 1024)
    lowered = jax.jit(decoder).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    config = config_of(architecture="decoder", num_layers=1, mlp="gelu")
    assert model_flops(config) == 3 * lowered.compile().cost_analysis()["flops"]


def device(kind: str) -> SimpleNamespace:
    return SimpleNamespace(device_kind=kind, platform="gpu" if "NVIDIA" in kind else "tpu")


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("TPU v3", 61.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
    ],
)
def test_peak_is_the_sum_over_devices_of_the_vendors_figure(kind, teraflops):
    assert peak_flops([device(kind)] * 4) == pytest.approx(4e12 * teraflops)


@pytest.mark.parametrize("kind", ["TPU v99", "NVIDIA L40", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA Z100"])
def test_there_is_no_peak_for_a_device_that_the_table_does_not_have(kind):
    assert peak_flops([device("NVIDIA H100 80GB HBM3"), device(kind)]) is None


def test_all_cpu_devices_together_have_one_machines_measured_rate():
    assert peak_flops(jax.devices("cpu")) == peak_flops(jax.devices("cpu")[:1])
    assert 1e9 < flops.measure_matmul_rate() < 1e14


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_throughput_leaves_out_the_first_step_and_pauses_but_time_left_counts_them():
    clock = Clock()
    throughput = Throughput(flops_per_step=600.0, peak=1000.0, clock=clock)
    clock.now += 50  # compiling
    assert throughput.read() == {} and throughput.seconds_left(10) is None
    throughput.tick(tokens=999)
    assert throughput.read() == {}
    for _ in range(4):
        clock.now += 2
        throughput.tick(tokens=30)
    with throughput.pause():
        clock.now += 12
    assert throughput.read() == {"train/tokens_per_second": 15.0, "train/step_seconds": 2.0, "train/mfu": 0.3}
    assert throughput.seconds_left(10) == 50  # 20 seconds for 4 steps
    clock.now += 3
    throughput.tick(tokens=30)
    assert throughput.read() == {"train/tokens_per_second": 10.0, "train/step_seconds": 3.0, "train/mfu": 0.2}
    assert throughput.read() == {}


def test_a_measured_peak_is_raised_by_faster_steps():
    clock = Clock()
    throughput = Throughput(600.0, 200.0, measured=True, clock=clock)
    found = []
    throughput.tick(0)
    for seconds in (4, 2, 4):  # 150, 300 and 150 FLOP/s
        clock.now += seconds
        throughput.tick(0)
        found.append(throughput.read()["train/mfu"])
    assert found == [0.75, 1.0, 0.5]


def test_a_pause_before_the_first_step_is_done_changes_nothing():
    clock = Clock()
    throughput = Throughput(600.0, None, clock=clock)
    with throughput.pause():
        clock.now += 5
    throughput.tick(1)
    clock.now += 2
    throughput.tick(30)
    assert throughput.read() == {"train/tokens_per_second": 15.0, "train/step_seconds": 2.0}  # no peak, no MFU


def write_run(workdir, steps, **start) -> None:
    writer = Writer(workdir, **start)
    for step in steps:
        writer.write(step, {"train/loss": 10.0 - step})
    writer.close()


def test_each_line_is_a_json_object_and_what_is_not_finite_is_null(tmp_path):
    writer = Writer(tmp_path)
    writer.write(1, {"train/loss": np.float32(4.5), "train/mfu": float("nan")})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # there before close: a kill loses nothing
    writer.close()
    assert [json.loads(line) for line in lines] == [{"step": 1, "train/loss": 4.5, "train/mfu": None}]


def test_a_resumed_run_has_each_step_once_and_no_half_lines(tmp_path):
    write_run(tmp_path, range(6))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')  # killed here; the last checkpoint was that of step 3
    assert [record["step"] for record in read(tmp_path)] == [0, 1, 2, 3, 4, 5]
    write_run(tmp_path, range(3, 8), step=3)
    assert read(tmp_path) == [{"step": step, "train/loss": 10.0 - step} for step in range(8)]


def test_a_resumed_run_adds_the_missing_values_of_the_last_step(tmp_path):
    write_run(tmp_path, [3])
    writer = Writer(tmp_path, step=3)
    writer.write(3, {"train/loss": 1.0, "eval/loss": 2.0})
    writer.close()
    assert read(tmp_path) == [{"step": 3, "train/loss": 7.0}, {"step": 3, "eval/loss": 2.0}]


BROKEN = [
    b"{oops",
    b"[1]",
    b'{"train/loss": 1.0}',
    b'{"step": true}',
    b'{"step": 2, "train/loss": "1.0"}',
    b'{"step": 2, "train/loss": [1]}',
    b'{"step": 2, "train/loss": 1%s}' % (b"0" * 400),
    b"\xff\xfe",
    b"\0" * 50,
    b"[" * 100_000,
]


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_line_that_no_kill_explains_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2 must be a JSON object with a step"):
        Writer(tmp_path)


@pytest.mark.parametrize(
    ("rest", "lines"),
    [(b"", 1), (b"{", 1), (b'{"step": 2, "tr', 1), (b"\0\0", 1), (b"[]", None), (b"oops", None)],
)
def test_only_a_line_that_was_cut_off_is_left_out(tmp_path, rest, lines):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + rest)
    if lines:
        assert len(read(tmp_path)) == lines
        return
    with pytest.raises(DataError, match=r"metrics\.jsonl:2 must be"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("metrics.jsonl", r"metrics\.jsonl can't be read: Is a directory; move it away"),
        ("loss.png", r"loss\.png can't be written: Is a directory; move it away"),
    ],
)
def test_a_directory_in_the_place_of_a_file_is_named(tmp_path, name, line):
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=line):
        write_run(tmp_path, range(2))
        draw_loss_curve(tmp_path)


def test_only_the_primary_process_writes(tmp_path):
    write_run(tmp_path / "run", range(3), primary=False)
    assert not (tmp_path / "run").exists()


def test_tensorboard_reads_the_same_values_and_forgets_what_came_after_the_resumed_step(tmp_path):
    write_run(tmp_path, range(4))
    write_run(tmp_path, [3, 4], step=2)
    found = {}
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        for event in events(path):
            if event.session_log.status == 1:  # START: drops this step and later ones
                found = {step: value for step, value in found.items() if step < event.step}
            for value in event.summary.value:
                found[event.step] = value.simple_value
    assert found == {step: 10.0 - step for step in (0, 1, 2, 3, 4)}


def limit_files(size: int | None) -> None:
    """Limit the files of this process, so that writing fails as on a full disk; None removes the limit."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits[1] if size is None else size, limits[1]))


def test_a_full_disk_neither_stops_nor_blocks_the_metrics_and_they_are_written_later(tmp_path, capsys):
    writer = Writer(tmp_path)
    writer.write(0, {"train/loss": 10.0})
    full = max(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) + 10  # room for parts of a record
    limit_files(full)
    try:
        for step in range(1, 200):
            writer.write(step, {"train/loss": 10.0 - step})
    finally:
        limit_files(None)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert 1 <= len(lines) < 9 and all(line.endswith(b"}\n") for line in lines)  # no part of a line
    writer.write(200, {"train/loss": -190.0})
    writer.close()
    assert read(tmp_path) == [{"step": step, "train/loss": 10.0 - step} for step in range(201)]
    [path] = (tmp_path / "tensorboard").iterdir()
    values = {event.step: value.simple_value for event in events(path) for value in event.summary.value}
    assert values == {step: 10.0 - step for step in range(201)}
    err = capsys.readouterr().err
    assert err.count("can't be written: File too large; the run continues") == 2  # once for each of the two files
    assert err.count("can be written again; nothing is missing") == 2 and err.count("\n") == 4


def test_metrics_that_were_never_written_are_reported_at_the_end(tmp_path, capsys):
    writer = Writer(tmp_path)
    limit_files(0)
    try:
        writer.write(1, {"train/loss": 10.0})
        writer.close()
    finally:
        limit_files(None)
    assert "1 records are missing in" in capsys.readouterr().err and read(tmp_path) == []


@pytest.mark.parametrize("change", ["remove", "rename"])
def test_a_run_directory_that_disappears_ends_the_run(tmp_path, change):
    writer = Writer(tmp_path / "run")
    shutil.rmtree(tmp_path / "run") if change == "remove" else (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="run is not there any more") as error:
        writer.write(1, {"train/loss": 10.0})
    assert error.value.exit_code == 4


def events(path) -> list:
    """A TFRecord file by hand: length (8 bytes), its checksum (4), data, its checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event

    content, found = path.read_bytes(), []
    while content:
        size = int.from_bytes(content[:8], "little")
        found.append(Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    return found


def test_writing_events_imports_no_pytorch(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if re.fullmatch(r"torch|tensorboardX(\..*)?", name)]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "torch.py").write_text("raise SystemExit('PyTorch was imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    Writer(tmp_path / "run").close()
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 1 and "torch" not in sys.modules
    with pytest.raises(SystemExit, match="PyTorch was imported"):
        import torch  # noqa: F401


def test_the_loss_curve_shows_each_series_that_there_is(tmp_path):
    write_run(tmp_path, range(3))
    pictures = [draw_loss_curve(tmp_path).read_bytes()]
    for step, name in enumerate(("eval/loss", "baseline/uniform", "baseline/unigram"), start=3):
        writer = Writer(tmp_path, step=step)
        writer.write(step, {name: 9.0, "train/grad_norm": float("nan")})
        writer.close()
        pictures.append(draw_loss_curve(tmp_path).read_bytes())
    assert len(set(pictures)) == 4


def test_the_loss_curve_replaces_the_last_one_whole_and_leaves_gaps_where_the_loss_was_not_finite(tmp_path):
    writer = Writer(tmp_path)
    for step, loss in enumerate((3.0, float("nan"), 2.0)):
        writer.write(step, {"train/loss": loss, "train/tokens_per_second": 500.0, "train/step_seconds": 2.0})
    writer.close()
    (tmp_path / "loss.png").write_bytes(b"old")
    with (tmp_path / "loss.png").open("rb") as reader:
        assert draw_loss_curve(tmp_path) == tmp_path / "loss.png"
        assert reader.read() == b"old"
    content = (tmp_path / "loss.png").read_bytes()
    assert content.startswith(b"\x89PNG") and content.endswith(b"IEND\xaeB`\x82")
    assert not list(tmp_path.glob(".*"))
