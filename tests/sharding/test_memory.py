"""What can't fit is refused by shapes alone; what could is not."""

from types import SimpleNamespace

import jax
import pytest
from conftest import small

from t5like.config.schema import Config
from t5like.data import pipeline
from t5like.errors import ConfigError
from t5like.optim import train_state
from t5like.sharding import auto, memory
from t5like.sharding import mesh as meshes


def check(config: Config, devices: int = 1) -> None:
    mesh = meshes.make_mesh(config, jax.devices()[:devices])
    batch, config = pipeline.spec(config), auto.resolve_auto(config, mesh)
    memory.check_training(config, batch, train_state.abstract_state(config, batch, mesh), mesh)


def test_the_bound_is_the_bytes_of_state_and_batch(monkeypatch):
    config = small(optimizer={"ema_decay": 0.9})
    mesh = meshes.make_mesh(config, jax.devices()[:1])
    batch = pipeline.spec(config)
    state = train_state.abstract_state(config, batch, mesh)
    state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state.params, state.opt_state, state.ema)))
    rows = 8 * (2 * 32 * 4) + 8 * 3 * 12 * 4  # a superset of the arrays of a row
    monkeypatch.setattr(memory, "host", lambda: state_bytes - 1)
    with pytest.raises(ConfigError, match=r"num_layers=2, model.model_dim=32, .* state of optimizer.name=adamw 0.0 GB"):
        check(config)
    monkeypatch.setattr(memory, "host", lambda: state_bytes + 100)
    with pytest.raises(ConfigError, match=r"^data.batch_size=8, data.inputs_length=32, .*: a batch needs at least"):
        check(config)
    monkeypatch.setattr(memory, "host", lambda: state_bytes + rows + 8 * 32 * (32 + 32) * 4)
    check(config)
    monkeypatch.setattr(memory, "host", lambda: None)
    check(small(model={"model_dim": 2**20, "mlp_dim": 2**24}))  # nothing is known of the machine


def test_devices_of_one_host_share_its_memory_and_parameters_that_are_split_count_once(monkeypatch):
    whole, split = small(), small(mesh={"data": 1, "fsdp": 8})
    mesh = meshes.make_mesh(whole, jax.devices()[:1])
    one = train_state.abstract_state(whole, pipeline.spec(whole), mesh)
    state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((one.params, one.opt_state)))
    monkeypatch.setattr(memory, "host", lambda: 4 * state_bytes)
    check(whole)
    check(split, devices=8)
    with pytest.raises(ConfigError, match="use a smaller model, or more devices with mesh.fsdp; t5like plan predicts"):
        check(whole, devices=8)  # eight copies


def test_sampled_answers_are_counted_with_their_scores_which_grow_with_the_square_of_their_number(monkeypatch):
    answers = lambda count: small(
        data={"objective": "supervised"},
        rl={"method": "policy", "rewards": ["length"], "answers_per_prompt": count},
    )
    scores = 8 * 4096 * 4096 * 12 * 4  # prompts, answers, keys of all of them
    monkeypatch.setattr(memory, "host", lambda: scores)
    check(answers(2048))
    with pytest.raises(ConfigError, match=r"rl.answers_per_prompt=4096: .* scores of sampled answers .* fewer rl."):
        check(answers(4096))


def test_texts_whose_cache_does_not_fit_are_refused(monkeypatch):
    config = auto.resolve_auto_for(small(), "cpu")
    memory.check_texts(config, prompt=32, new=64, texts=4)
    with pytest.raises(ConfigError, match="prompt of 32 tokens with 65,536 texts of 1,048,576 tokens needs at least"):
        memory.check_texts(config, prompt=32, new=2**20, texts=2**16)
    with pytest.raises(ConfigError, match="prompt of 1,048,576 tokens with 1 texts of 64 tokens needs at least 4,398"):
        memory.check_texts(config, prompt=2**20, new=64, texts=1)
    monkeypatch.setattr(memory, "host", lambda: None)
    memory.check_texts(config, prompt=2**20, new=64, texts=1)


def test_memory_of_accelerators_is_their_limit_and_of_a_container_its_limit(tmp_path, monkeypatch):
    gpu = lambda limit: SimpleNamespace(process_index=0, platform="gpu", memory_stats=lambda: limit)
    assert memory.of_devices([gpu({"bytes_limit": 3}), gpu({"bytes_limit": 4})]) == 7
    assert memory.of_devices([gpu({"bytes_limit": 3}), gpu(None)]) is None
    (tmp_path / "limit").write_text("1000\n")
    (tmp_path / "unlimited").write_text("max\n")
    machine = memory.host()
    monkeypatch.setattr(memory, "LIMITS", (tmp_path / "unlimited", tmp_path / "absent"))
    assert memory.host() >= machine > 2**28
    monkeypatch.setattr(memory, "LIMITS", (tmp_path / "unlimited", tmp_path / "limit"))
    assert memory.host() == 1000
