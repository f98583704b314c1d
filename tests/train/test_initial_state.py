"""The initial state: existing parameters are used as they are, and only the others are initialized at random."""

import shutil
from functools import partial

import flax.linen as nn
import jax
import numpy as np
from conftest import random_batch, small, write_text
from small_states import REST, assert_bitwise, new_state, on_mesh

from t5like import tree
from t5like.checkpoint.checkpoints import Checkpoints
from t5like.optim import bad_steps, train_state
from t5like.sharding import mesh as meshes
from t5like.train.initial_state import restore_state


def test_parameters_drawn_one_by_one_on_a_mesh_are_those_that_the_model_draws_on_one_device(monkeypatch):
    config = small(model={"architecture": "decoder"}, mesh={"fsdp": 2, "data": 4}, seed=3)
    batch = random_batch(config)
    boxes = jax.jit(partial(train_state.init_params, config, batch))(jax.random.key(3))
    mesh = meshes.make_mesh(config)
    drawn = train_state.new_state(config, batch, train_state.abstract_state(config, batch, mesh)).params
    assert_bitwise(drawn, nn.meta.unbox(boxes))
    monkeypatch.setattr(train_state, "SMALL", 2**11)  # larger ones by a program for each shape
    assert_bitwise(tree.nested(train_state.random_params(config, batch, jax.random.key(3))), nn.meta.unbox(boxes))


def test_only_missing_parameters_are_random_with_the_values_of_a_random_state():
    config = small(mesh={"fsdp": 2, "data": 4}, optimizer={"ema_decay": 0.9})
    batch = random_batch(config)
    abstract = train_state.abstract_state(config, batch, meshes.make_mesh(config))
    expected = tree.flatten(jax.device_get(train_state.new_state(config, batch, abstract)))
    names = list(tree.flatten(abstract.params))
    for given in (names[::2], names):
        params = {
            name: jax.device_put(expected[f"params/{name}"] + 1, leaf.sharding)
            for name, leaf in tree.flatten(abstract.params).items()
            if name in given
        }
        state = train_state.new_state(config, batch, abstract, params)
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(lambda leaf: leaf.sharding, abstract)
        for name, leaf in tree.flatten(state).items():
            parameter = name.removeprefix("params/").removeprefix("ema/")
            added = 1 if parameter in given and name.startswith(("params/", "ema/")) else 0
            np.testing.assert_array_equal(leaf, expected[name] + np.asarray(added, leaf.dtype), err_msg=name)
        jax.jit(lambda state: jax.tree.map(lambda x: x * 2, state), donate_argnums=0)(state)  # no shared buffers


def test_a_run_is_not_continued_on_other_data_unless_they_are_allowed(command, decoder_flags, tmp_path):
    write_text(tmp_path / "own.txt", lines=200)
    own = [f"--config.data.source=text:{tmp_path}/own.txt", f"--workdir={tmp_path}/run"]
    own = [*decoder_flags, *own, f"--config.data.cache_directory={tmp_path}/cache"]
    train = lambda *more: command("train", *own, *more)
    assert train("--config.train.num_steps=1")[0] == 0

    with (tmp_path / "own.txt").open("a") as file:
        file.write("one line more.\n")
    shutil.rmtree(tmp_path / "cache")  # otherwise the changed file is refused before
    more = ("--config.train.num_steps=2", f"--config.tokenizer.path={tmp_path}/run/tokenizer.model")
    code, _, err = train(*more)
    assert code == 3 and "the data differ from those that the run in" in err
    assert f"text:{tmp_path}/own.txt: 200 documents, " in err and "-> 201 documents, " in err
    assert err.endswith("; put them back, or add --allow_change=data to continue\n")
    code, out, err = train(*more, "--allow_change=data")
    assert code == 0 and f"change     data: text:{tmp_path}/own.txt: 200 documents" in out
    history = Checkpoints(tmp_path / "run" / "checkpoints", keep=9).meta().history
    assert history.data[f"text:{tmp_path}/own.txt"].startswith("201 documents")


def test_the_window_of_the_spike_check_is_restored_begins_again_or_is_dropped(tmp_path):
    without = new_state(1)
    window = jax.device_put(np.full((2, bad_steps.WINDOW), 1.5, np.float32), without.step.sharding)
    saved = {}
    for name, state in (("without", without), ("with", without._replace(recent=window))):
        saved[name] = Checkpoints(tmp_path / name, keep=1)
        saved[name].save(state, **REST)
        saved[name].wait()
    abstract = on_mesh(without._replace(recent=window), data=1)
    assert np.array_equal(restore_state(saved["with"], abstract, 1).recent, window)
    assert restore_state(saved["with"], abstract._replace(recent=None), 1).recent is None
    again = restore_state(saved["without"], abstract, 1)
    assert np.isnan(again.recent).all() and again.recent.shape == (2, bad_steps.WINDOW)
    assert_bitwise(again._replace(recent=None), without)
