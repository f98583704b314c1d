"""The quick estimate: its FLOPs, and what it takes for written scores, by chip, window and kind of attention."""

import dataclasses
from pathlib import Path

from conftest import small

from t5like.config import loader
from t5like.metrics import flops
from t5like.plan import estimate, topology
from t5like.sharding import auto
from t5like.sharding import mesh as meshes

CONFIGS = Path(__file__).parents[2] / "configs"


def test_scores_are_written_only_where_the_chip_has_no_room_for_the_kernel_and_in_windows_fewer():
    settings = [("data.batch_size", "64"), ("model.attention_window", "512")]
    config = auto.resolve_auto_for(loader.load(CONFIGS / "t5gemma_2b.py", settings), "tpu")

    def written(name, **fields):
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))
        machine = topology.parse(name)
        sizes = meshes.axis_sizes(changed, machine.num_devices)
        each = (estimate._materialized_keys(changed, machine, sizes, stack) for stack in flops.stack_shapes(changed))
        return [keys.all_layers for keys in each]

    assert written("v5e:8x8") == [0, 0]
    blocks = [13 * (4096 + (1 + 8 + 8) * 64), 13 * (4096 + (1 + 8) * 64) + 26 * 4096]  # 13 local, 13 global, 26 cross
    assert written("v5p:4x4x4") == blocks
    assert written("v5p:4x4x4", merged_attention=True) == [blocks[0], 26 * 2 * 4096]


def test_the_quick_estimate_without_remat_has_the_model_flops():
    config = auto.resolve_auto_for(small(data={"batch_size": 64}), "tpu")
    held = estimate.persistent_memory(estimate.abstract_inputs(config), meshes.axis_sizes(config, 8))
    assert estimate.quick_estimate(config, topology.parse("v5e:2x4"), held).flops == flops.model_flops(config) / 8
