"""The fused GPU kernels, in Pallas' interpreter, against plain attention; and where a train step has them."""

import functools

import attention_cases
import jax
import numpy as np
import pytest
from conftest import random_batch, small
from model_variants import loss_and_gradients, params_of, with_model

from t5like.data import pipeline
from t5like.errors import ConfigError
from t5like.model import attention
from t5like.model.kernels import gpu_attention
from t5like.model.kernels.fused_attention import KernelSpec
from t5like.model.kernels.gpu_attention_kernels import KernelInputs, Program, Sizes
from t5like.optim import step, train_state
from t5like.sharding import auto
from t5like.sharding import mesh as meshes

CASES = {
    "relative": {"mesh": {"data": 2, "tensor": 2}, "queries": 40, "keys": 37, "head_dim": 24, "relative": True}
    | {"window": 20, "ahead": 9, "softcap": 0.7},
    "packed": {"queries": 40, "heads": 4, "causal": True, "segments": True, "prefix": True, "window": 20},
    "cross": {"queries": 20, "keys": 35, "segments": True, "dtype": "bfloat16"},
    "context": {"mesh": {"tensor": 2, "context": 2}, "queries": 64, "heads": 4, "causal": True, "relative": True},
}


@pytest.mark.parametrize("case", CASES)
def test_the_gpu_kernels_equal_plain_attention_with_gradients(rng, monkeypatch, case):
    blocks = {"forward": (32, 16, 4, 2), "queries": (16, 16, 4, 2), "keys": (16, 32, 4, 2), "bias": (16, 16, 4, 2)}
    several = {(kernel, 128): 2 * (gpu_attention.Blocks(*sizes),) for kernel, sizes in blocks.items()}
    monkeypatch.setattr(gpu_attention, "BLOCKS", several)  # of each of these short rows

    def fused(q, k, v, bias, mask):
        if bias is not None:
            index = gpu_attention.distances(q.shape[2], k.shape[2]) + q.shape[2] - 1
            bias = gpu_attention.bias_per_shard(bias[:, index.clip(0, bias.shape[1] - 1)].swapaxes(0, 1))
        return gpu_attention.attend(q, k, v, bias, mask, softcap=CASES[case].get("softcap", 0.0), interpret=True)

    attention_cases.compare(rng, fused, **CASES[case])


@pytest.mark.parametrize("window, ahead, limit", [(128, 0, 0.14), (64, 64, 0.14), (512, 0, 0.28), (0, 0, 1.0)])
def test_only_blocks_in_a_window_are_visited(window, ahead, limit):
    length, blocks = 2048, gpu_attention.Blocks(128, 64, 4, 2)
    spec = KernelSpec(bool(window and not ahead), window, ahead, interpret=True)
    program = Program(spec, Sizes(length, length, 64, 1), blocks, KernelInputs(None, None, None))
    count = lambda visited, size: sum(int(end - start) for start, end in map(visited, range(0, length, size)))
    keys = count(lambda first: program.key_blocks(0, first), blocks.queries)
    queries = count(lambda first: program.query_blocks(0, first), blocks.keys)
    assert limit * 0.75 <= keys * blocks.keys * blocks.queries / length**2 <= limit
    assert limit * 0.75 <= queries * blocks.keys * blocks.queries / length**2 <= limit


def test_a_step_for_gpus_has_the_kernels_in_every_attention_and_other_devices_refuse_them():
    config = small(model={"num_layers": 1, "kernels": "gpu", "layers": "scan", "dtype": "bfloat16"}, mesh={"fsdp": 8})
    with pytest.raises(ConfigError, match="kernels=auto"):
        auto.resolve_auto_for(config, "tpu")
    with pytest.raises(ConfigError, match="this GPU"):
        auto.resolve_auto_for(config, "gpu", fused=False)
    mesh, batch = meshes.make_mesh(config), pipeline.spec(config)
    abstract = train_state.abstract_state(config, batch, mesh)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    card = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")  # jax 0.11 asks for one without a GPU
    with jax.set_mesh(mesh), jax.sharding.use_abstract_mesh(mesh.abstract_mesh.update(abstract_device=card)):
        lowered = step.jit_train_step(config, abstract).trace(abstract, shapes).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    kernels = {name: text.count(f'name = "attention_{name}"') for name in ("forward", "queries", "keys", "bias")}
    assert kernels == {"forward": 3, "queries": 3, "keys": 3, "bias": 2}


def test_a_model_for_gpus_hands_the_kernel_the_bias_and_masks_of_the_plain_model(monkeypatch):
    def attend(q, k, v, bias, mask, softcap):
        bias = None if bias is None else gpu_attention.bias_array(bias, q.shape[2], k.shape[2])
        return attention.attend(q, k, v, bias_1NLS=bias, mask=mask, softcap=softcap)

    monkeypatch.setattr(gpu_attention, "attend", attend)
    plain, fused = (with_model("t5", num_layers=1, kernels=kernels) for kernels in ("plain", "gpu"))
    params, batch = params_of(plain), random_batch(plain)
    expected, computed = (loss_and_gradients(config, params, batch) for config in (plain, fused))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), computed, expected)
