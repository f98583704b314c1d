"""Times of GPUs: kernels and collectives next to measured ones, bytes of fusions, a step, a plan without compiler."""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from t5like.config import loader
from t5like.errors import ConfigError
from t5like.metrics import flops
from t5like.model.kernels import gpu_attention
from t5like.model.kernels.fused_attention import KernelSpec
from t5like.model.kernels.gpu_attention_kernels import Blocks, KernelInputs, forward_kernel
from t5like.plan import estimate, gpu_time, hlo_cost, report, topology

CONFIGS = Path(__file__).parents[2] / "configs"
H100 = topology.parse("h100:8")
# Measured on an H100: openxla/xla, xla/service/gpu/model, matmul_interpolator_data.h (matmuls, m, n, k, TFLOP/s) and
# collective_interpolator_data.h (bytes of the whole array, GB/s of them, on 8 GPUs).
MATMULS = [
    (1, 512, 512, 2048, 114.7),
    (1, 1024, 1024, 4096, 470.1),
    (1, 4096, 256, 512, 137.2),
    (1, 4096, 2048, 1024, 593.2),
    (2, 2048, 2048, 512, 447.0),
    (2, 4096, 4096, 256, 464.0),
    (2, 1024, 4096, 4096, 747.7),
    (4, 4096, 256, 512, 335.1),
    (4, 2048, 4096, 4096, 801.9),
]
COLLECTIVES = [
    ("all-gather", 2**14, 0.5322),
    ("all-gather", 2**29, 384.0),
    ("all-gather", 2**31, 400.1),
    ("reduce-scatter", 2**29, 359.2),
    ("all-reduce", 2**29, 218.1),
]
PROGRAM = """HloModule step

%slice (stacked: bf16[24,1024,1024], layer: s32[]) -> f32[1024,1024] {
  %stacked = bf16[24,1024,1024]{2,1,0} parameter(0)
  %layer = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = bf16[1,1024,1024]{2,1,0} dynamic-slice(%stacked, %layer, %zero, %zero), dynamic_slice_sizes={1,1024,1024}
  %flat = bf16[1024,1024]{1,0} bitcast(%one)
  ROOT %wide = f32[1024,1024]{1,0} convert(%flat)
}

%save (saved: f32[24,1024], row: f32[1024], layer: s32[]) -> f32[24,1024] {
  %saved = f32[24,1024]{1,0} parameter(0)
  %row = f32[1024]{0} parameter(1)
  %layer = s32[] parameter(2)
  %zero = s32[] constant(0)
  %as_slice = f32[1,1024]{1,0} bitcast(%row)
  ROOT %update = f32[24,1024]{1,0} dynamic-update-slice(%saved, %as_slice, %layer, %zero)
}

%product (a: bf16[4096,4096], b: bf16[4096,4096]) -> bf16[4096,4096] {
  %a = bf16[4096,4096]{1,0} parameter(0)
  %b = bf16[4096,4096]{1,0} parameter(1)
  ROOT %dot = bf16[4096,4096]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (w: bf16[24,1024,1024], s: f32[24,1024], r: f32[1024], l: s32[], a: bf16[4096,4096]) -> bf16[4096,4096] {
  %w = bf16[24,1024,1024]{2,1,0} parameter(0)
  %s = f32[24,1024]{1,0} parameter(1)
  %r = f32[1024]{0} parameter(2)
  %l = s32[] parameter(3)
  %a = bf16[4096,4096]{1,0} parameter(4)
  %sliced = f32[1024,1024]{1,0} fusion(%w, %l), kind=kLoop, calls=%slice
  %kept = f32[24,1024]{1,0} fusion(%s, %r, %l), kind=kLoop, calls=%save
  %start = (bf16[512,4096]{1,0}, bf16[4096,4096]{1,0}) all-gather-start(%a), replica_groups=[1,8]<=[8], dimensions={0}
  %out = bf16[4096,4096]{1,0} fusion(%a, %a), kind=kCustom, calls=%product
  %done = bf16[4096,4096]{1,0} all-gather-done(%start)
  %sync = (f32[1024]{0}, f32[1024]{0}) all-reduce-start(%r), replica_groups=mesh['x'=2,'y'=4] {'x'}, \
backend_config={"collective_backend_config":{"is_sync":true}}
  %reduced = f32[1024]{0} all-reduce-done(%sync)
  ROOT %q = bf16[8,12,64,64]{3,2,1,0} custom-call(%four, %four), custom_call_target="__gpu$xla.gpu.triton", \
metadata={op_name="attention/attention_keys/pallas_call"}
  %four = bf16[8,12,64,64]{3,2,1,0} bitcast(%a)
}
"""


@pytest.mark.parametrize("batch, m, n, k, measured", MATMULS)
def test_a_matmul_takes_its_measured_time_to_a_quarter(batch, m, n, k, measured):
    work = 2 * batch * m * n * k
    seconds = gpu_time.rates(H100).nanoseconds(work, 2 * batch * (m * k + k * n + m * n)) / 1e9
    assert seconds == pytest.approx(work / measured / 1e12, rel=0.25)


def test_a_kernel_with_a_window_computes_the_keys_that_its_name_says():
    shapes = [(8, 12, 2048, 64), (8, 4, 2048, 64)]
    work = lambda name: gpu_time.attention_flops(f"decoder/attention/{name}/pallas_call", shapes)
    assert work("attention_forward") == 4 * 8 * 12 * 2048 * 2048 * 64
    assert work("attention_forward_of_512_keys") == work("attention_forward") / 4
    inputs = KernelInputs(None, jnp.zeros((1, 1, 2048, 16)), None)
    name = lambda *mask: gpu_attention._name(
        forward_kernel, KernelSpec(*mask, interpret=True), inputs, Blocks(128, 128, 8, 2)
    )
    assert [name(True, 0, 0), name(True, 2048, 0)] == ["attention_forward"] * 2
    assert [name(True, 257, 0), name(False, 65, 65)] == [
        "attention_forward_of_384_keys",
        "attention_forward_of_256_keys",
    ]


@pytest.mark.parametrize("kind, size, measured", COLLECTIVES)
def test_a_collective_takes_its_measured_time_to_a_sixth(kind, size, measured):
    assert gpu_time.wire_seconds(kind, size, H100, 8) == pytest.approx(size / measured / 1e9, rel=1 / 6)


def test_a_collective_between_hosts_is_as_slow_as_the_network():
    two = topology.parse("h100:2x8")
    seconds = lambda group, stride=1: gpu_time.wire_seconds("all-gather", 2**33, two, group, stride)
    assert seconds(8) < seconds(16) < seconds(2, 8)  # all adapters of a host share the second one's bytes
    assert seconds(2, 8) == pytest.approx(2**32 / (0.75 * 50e9), rel=1e-3)
    assert [gpu_time.hosts_of_group(two, *group) for group in ((8, 1), (16, 1), (2, 8), (4, 2))] == [1, 2, 2, 1]


def test_a_fusion_moves_the_slices_that_it_uses_and_a_kernel_takes_the_longer_of_work_and_bytes():
    analysis = hlo_cost.analyze(PROGRAM, gpu_time.rates(H100))
    module = hlo_cost.Module(PROGRAM)
    main = module.computations["main"]
    moved = {name: gpu_time.kernel_bytes(module.computations, main, main[name]) for name in ("sliced", "kept", "out")}
    assert moved == {"sliced": 2**20 * (2 + 4) + 4, "kept": 2 * 4096 + 4, "out": 3 * 2**25}  # 4: the layer's index
    by_bytes = moved["sliced"] / (0.8 * 3352.32) + 6000  # in nanoseconds, which are a GPU's cycles
    by_work = 2 * 4096**3 / (0.8 * 989e3) + 6000
    times = sorted(item.cycles for item in analysis.work if item.category != "custom")
    assert times == pytest.approx([8196 / (0.8 * 3352.32) + 6000, by_bytes, by_work])
    [attention] = [item for item in analysis.work if item.category == "custom"]
    assert attention.flops == 2 * 4 * 8 * 12 * 64 * 64 * 64
    gather, reduce = analysis.collectives
    assert (gather.asynchronous, gather.hiding, gather.stride) == (True, pytest.approx(by_work), 1)
    assert (reduce.asynchronous, reduce.hiding, reduce.group, reduce.stride) == (False, 0.0, 2, 4)
    step = estimate.predict(analysis, H100)
    assert step.exposed == pytest.approx(gpu_time.wire_seconds("all-reduce", 4096, H100, 2, 4))
    assert step.seconds == pytest.approx(analysis.cycles()["total"] / 1e9 + step.exposed)


def test_the_estimate_of_a_chip_is_that_of_a_plan_and_names_are_known(command):
    arguments = ("--config=configs/t5_base.py", "--quick", "--json", "--config.data.batch_size=64")
    code, out, err = command("plan", *arguments, "--topology=h100:1")  # the CUDA compiler is not installed here
    assert code == 0, err
    plan = json.loads(out)
    config = loader.load(CONFIGS / "t5_base.py", [("data.batch_size", "64")])
    assert plan["quick"]["seconds"] == estimate.step_seconds(config, "h100")
    assert plan["quick"]["mfu"] == pytest.approx(0.48, rel=0.02) and "not calibrated" in report.text(plan)
    assert estimate.step_seconds(config, "h100") < estimate.step_seconds(config, "a100")
    with pytest.raises(ConfigError, match="chip=h900 must be one of v4, .*; use h100"):
        estimate.step_seconds(config, "h900")
    kinds = ["NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "TPU v5 lite", "NVIDIA H100 PCIe", "cpu"]
    assert [topology.kind_of_device(kind) for kind in kinds] == ["h100", None, "v5e", None, None]
    for kind in topology.GPUS:  # each has a peak, links and a description
        chip = topology.one_chip(kind).chip
        assert chip.peak == flops.PEAK_FLOPS[kind.upper()] and chip.clock == pytest.approx(1e9) and chip.ici > chip.dcn
