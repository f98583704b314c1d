"""Names of TPU slices, against the tables of Google's documentation."""

import pytest

from launch.accelerators import accelerator_type, hosts_per_slice
from t5like.errors import ConfigError
from t5like.plan.topology import parse

# cloud.google.com/tpu/docs/v5p: shape, TensorCores, machines.
V5P = [
    ("2x2x1", 8, 1),
    ("2x2x2", 16, 2),
    ("2x4x4", 64, 8),
    ("4x4x4", 128, 16),
    ("4x4x8", 256, 32),
    ("4x8x8", 512, 64),
    ("8x8x8", 1024, 128),
    ("8x8x16", 2048, 256),
    ("8x16x16", 4096, 512),
    ("16x16x16", 8192, 1024),
    ("16x16x24", 12288, 1536),
]


@pytest.mark.parametrize(("shape", "cores", "machines"), V5P)
def test_v5p_slices_are_named_by_tensor_cores_and_have_four_chips_per_machine(shape, cores, machines):
    topology = parse(f"v5p:{shape}")
    assert (accelerator_type(topology), hosts_per_slice(topology)) == (f"v5p-{cores}", machines)


def test_v5e_and_v6e_slices_are_named_by_chips():
    assert accelerator_type(parse("v5e:16x16")) == "v5litepod-256"
    assert accelerator_type(parse("v6e:2x2")) == "v6e-4"
    assert [hosts_per_slice(parse(f"v5e:{shape}")) for shape in ("2x2", "2x4", "4x4")] == [1, 1, 4]


def test_a_shape_without_accelerator_type_is_refused_with_the_shape_that_has_one():
    with pytest.raises(ConfigError, match=r"v4:4x4x16 can't be requested .* use --accelerator=v4:4x8x8"):
        accelerator_type(parse("v4:4x4x16"))
