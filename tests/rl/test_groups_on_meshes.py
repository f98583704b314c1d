"""Loss and gradients of a step are those of one device, on any mesh and with microbatches, for ragged answers."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import begun, small
from test_encode_once import shape_of, tokens

from t5like.config.schema import Config
from t5like.inference.prompt_format import Prompt
from t5like.optim import train_state
from t5like.optim.step import make_gradient
from t5like.rl import experience, objective, packing
from t5like.rl.experience import Experience
from t5like.sharding import mesh as meshes
from t5like.sharding import placement

PROMPTS, ANSWERS = 8, 3
ALL = {"data": 2, "fsdp": 2, "tensor": 2}


def steps_of(config: Config) -> Experience:
    """Answers of 1 to `data.targets_length` tokens with what each loss needs; the last prompt's are masked."""
    rng = np.random.default_rng(1)
    answers = [[tokens(rng, config.data.targets_length) for _ in range(ANSWERS)] for _ in range(PROMPTS)]
    rows = experience.answer_rows(config, [Prompt(tokens(rng, 16)) for _ in range(PROMPTS)], answers)
    rows.mask_BGL[-1] = 0
    normal = lambda mean: (mean + 0.3 * rng.normal(size=rows.mask_BGL.shape)).astype(np.float32)
    per_answer = lambda: np.broadcast_to(normal(0.0)[..., :1], rows.mask_BGL.shape)
    return rows._replace(
        advantages_BGL=per_answer() * rows.mask_BGL,
        sampler_log_p_BGL=normal(-6.0),
        old_log_p_BGL=normal(-6.0),
        reference_log_p_BGL=normal(-6.0),
    )


@pytest.mark.parametrize(
    "aggregation, ratio, microbatches, axes",
    [
        ("token_mean", "token", 2, ALL),
        ("sequence_mean", "sequence", 4, {"data": 2}),
        ("constant", "token", 2, ALL),
    ],
)
def test_loss_and_gradients_do_not_depend_on_mesh_or_microbatches(aggregation, ratio, microbatches, axes):
    rl = {"aggregation": aggregation, "ratio": ratio, "reference": "first", "kl_coefficient": 0.1}
    rl |= {"answers_per_prompt": ANSWERS, "updates_per_rollout": 2, "entropy_coefficient": 0.01}
    expected = None
    for parts, mesh_axes in [(1, {}), (microbatches, axes)]:
        config = shape_of(rl=rl, num_layers=1, num_kv_heads=4)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, microbatches=parts))
        config = dataclasses.replace(config, mesh=small(mesh=mesh_axes).mesh)
        rows, spec = steps_of(config), experience.spec(config)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), rows) == jax.tree.map(lambda x: (x.shape, x.dtype), spec)
        batch = rows.rows()
        mesh = meshes.make_mesh(config, jax.devices()[: int(np.prod([*mesh_axes.values(), 1]))])
        if expected and aggregation == "constant":  # packed rows have the numbers of others
            rows = packing.pack(rows, packing.parts_of(config, mesh)).rows(rows)
            assert rows.segments_BGL.max() > 1 and len(rows.mask_BGL) == PROMPTS
        abstract = train_state.abstract_state(config, batch, mesh)
        params = begun(config, batch, abstract).params
        gradient = jax.jit(make_gradient(config, objective.policy_objective))
        with jax.set_mesh(mesh):
            grads, metrics = gradient(params, placement.to_global(rows, mesh, PROMPTS), 0)
        if expected is None:
            expected = jax.device_get((grads, metrics))
            assert metrics["loss"].weight > 0 and abs(metrics["loss"].total) > 0.1
            continue
        for actual, desired in zip(jax.tree.leaves((grads, metrics)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=1e-5)
