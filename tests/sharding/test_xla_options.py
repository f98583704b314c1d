"""The compiler's options: each chip its own, the config's last, refusals in a line."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import random_batch, small

from t5like.errors import ConfigError
from t5like.optim import step, train_state
from t5like.sharding import mesh as meshes
from t5like.sharding import xla_options


def mesh_of(kind: str):
    """As much of a mesh as the options ask."""
    return SimpleNamespace(devices=np.array([SimpleNamespace(device_kind=kind)]))


def options(kind: str, *own: str):
    """The options of the train step on a chip, with those of a config."""
    return xla_options.of_training(small(train={"compiler_options": own}).train, mesh_of(kind))


def test_each_chip_has_its_options_which_the_config_overrides():
    assert options("AMD Instinct MI300X") == {} and [*options("cpu")] == ["xla_cpu_scheduler_type"]
    for gpu in ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"):  # layers gather ahead and reduce afterwards
        pipelined = {name.rpartition("_all_")[2] for name in options(gpu) if "_pipeline" in name}
        assert pipelined == {"gather", "reduce"} and all(options(gpu).values())
    v5e = options("TPU v5 lite")
    assert v5e["xla_enable_async_all_reduce"] is True and not any("sparse_core" in name for name in v5e)
    assert options("TPU v6 lite") == options("TPU v5") and all("sparse_core" in name for name in options("TPU v5"))
    own = options("TPU v5 lite", "xla_enable_async_all_reduce=false", "xla_a=3")
    assert own == v5e | {"xla_enable_async_all_reduce": False, "xla_a": "3"}
    assert options("TPU v5 lite", "none", "xla_a=true") == {"xla_a": True}


def test_evaluation_has_only_the_options_of_the_chip():
    train = small(train={"compiler_options": ["xla_a=3"]}).train
    assert xla_options.of_chip(train, mesh_of("TPU v5")) == options("TPU v5")
    assert xla_options.of_chip(small(train={"compiler_options": ["none"]}).train, mesh_of("TPU v5")) == {}


@pytest.mark.parametrize("option", ["xla_nothing=1", "xla_backend_optimization_level=high"])
def test_an_option_that_the_compiler_refuses_is_an_error_of_one_line(option):
    config = small(train={"compiler_options": [option]})
    mesh = meshes.make_mesh(config, jax.devices()[:1])
    batch = random_batch(config)
    with pytest.raises(ConfigError, match=f"train.compiler_options: .*{option.split('=')[0]}.*use --config.*none"):
        step.compile_train_step(config, batch, train_state.abstract_state(config, batch, mesh))


@pytest.mark.parametrize("option", ["fast", "xla_a", "--xla_a=1", "xla_a=1=2"])
def test_text_that_is_no_option_is_refused(option):
    with pytest.raises(ConfigError, match="train.compiler_options=.* must be none or XLA's options"):
        small(train={"compiler_options": [option]})
