"""A run with a teacher: it is continued bitwise with the same one, and another one is refused."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ENCODER_DECODER, main
from test_init_from import made_tokenizer
from test_recovery import truncate

from t5like import tree
from t5like.checkpoint.checkpoints import Checkpoints
from t5like.checkpoint.run_directory import saved_config
from t5like.checkpoint.teacher import open_teacher, read_params
from t5like.data import pipeline
from t5like.optim import train_state
from t5like.sharding import mesh as meshes


def leaves(workdir, step: int) -> dict:
    return Checkpoints(workdir / "checkpoints", keep=9).meta(step).leaves


@pytest.fixture(scope="module")
def student(decoder_flags, trained_decoder, tmp_path_factory):
    """Flags of a run with a teacher, a copy of `trained_decoder` at step 1; the copy; a finished run of 3 steps."""
    place = tmp_path_factory.mktemp("student")
    shutil.copytree(trained_decoder, place / "teacher", ignore=shutil.ignore_patterns("2"))
    values = {"distill.teacher": place / "teacher", "train.checkpoint_every": 1, "distill.temperature": 2}
    # The first two updates train attention alone.
    values |= {
        "init_from.checkpoint": trained_decoder,
        "init_from.reinitialize": "decoder/.*attention/.*",
        "init_from.warmup_steps": 2,
    }
    flags = [*decoder_flags, *(f"--config.{name}={value}" for name, value in values.items())]
    assert main(["train", *flags, "--config.train.num_steps=3", f"--workdir={place}/whole"]) == 0
    return flags, place


def test_a_run_with_a_teacher_and_a_warmup_continues_bitwise_with_the_same_teacher_alone(
    student, trained_decoder, command, refused, tmp_path
):
    flags, place = student
    train = lambda *more: ("train", *flags, f"--workdir={tmp_path}/run", *more)
    # As if the run had been killed in its second step.
    shutil.copytree(place / "whole", tmp_path / "run")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    shutil.copytree(place / "teacher", tmp_path / "moved")
    shutil.copytree(
        trained_decoder / "checkpoints" / "2", tmp_path / "moved" / "checkpoints" / "2"
    )  # the teacher went on
    code, out, err = command(*train("--config.train.num_steps=3", f"--config.distill.teacher={tmp_path}/moved"))
    assert code == 0 and " parameters, step 1 of run " in out, err
    for step in (1, 2, 3):
        assert leaves(tmp_path / "run", step) == leaves(place / "whole", step)
    code, message = refused(*train("--config.train.num_steps=4", f"--config.distill.teacher={place}/whole"))
    assert code == 3 and "distill.teacher: step 1 of run " in message and " -> step 1 of run " in message

    first, second, third = (leaves(place / "whole", step) for step in (1, 2, 3))
    moved = lambda old, new: {name for name in old if name.startswith("params/") and old[name] != new[name]}
    assert moved(first, second) and all("/attention/" in name for name in moved(first, second))
    assert "params/embedding" in moved(second, third)
    records = map(json.loads, (place / "whole" / "metrics.jsonl").read_text().splitlines())
    assert all(record["train/distill_kl"] > 0 for record in records if "train/loss" in record)


def test_a_teacher_that_can_not_be_used_is_refused_in_one_line(student, refused, tmp_path):
    flags, place = student
    train = lambda *more: refused("train", *flags, f"--workdir={tmp_path}/new", *more)
    assert train("--config.distill.teacher=/none") == (
        4, "distill.teacher=/none contains no run; use the directory of a trained one"
    )  # fmt: skip
    code, message = train("--config.distill.teacher_step=7")
    assert code == 4 and message.endswith("teacher holds no complete checkpoint of step 7; there are 1")
    shutil.copytree(place / "teacher", tmp_path / "begun", ignore=shutil.ignore_patterns("checkpoints"))
    for field in ("distill.teacher", "init_from.checkpoint"):
        assert train(f"--config.{field}={tmp_path}/begun") == (
            4, f"{field}={tmp_path}/begun holds no complete checkpoint; train that run first, or use another one"
        )  # fmt: skip
    code, message = train(*(f"--config.{name}={value}" for name, value in ENCODER_DECODER.items()))
    assert code == 2 and "teacher has model.architecture=decoder, and the run encoder_decoder; " in message

    shutil.copytree(place / "teacher", tmp_path / "labels")
    values = json.loads((place / "teacher" / "config.json").read_text())
    values["data"]["objective"], values["model"]["architecture"] = ["regression"], "encoder"
    (tmp_path / "labels" / "config.json").write_text(json.dumps(values))
    code, message = train(f"--config.distill.teacher={tmp_path}/labels")
    assert code == 2 and "labels has data.objective=regression and predicts labels, and the run tokens; " in message

    other = made_tokenizer([], 20)
    (tmp_path / "other.model").write_bytes(other.model_bytes)
    own = [f"--config.tokenizer.path={tmp_path}/other.model", f"--config.tokenizer.vocab_size={other.vocab_size}"]
    code, message = train(*own, "--config.init_from.adapt=vocabulary")
    assert code == 3 and f"teacher has another tokenizer (400 ids) than the run ({other.vocab_size} ids)" in message
    assert message.endswith(f"use --config.tokenizer.path={place}/teacher/tokenizer.model")

    shutil.copytree(place / "teacher", tmp_path / "damaged")
    truncate(tmp_path / "damaged" / "checkpoints" / "1")
    code, message = train(f"--config.distill.teacher={tmp_path}/damaged")
    assert code == 4 and message.startswith(f"distill.teacher: {tmp_path}/damaged/checkpoints/1")
    assert message.endswith("; use another one with --config.distill.teacher_step")
    assert not (tmp_path / "new").exists()


def test_matrices_of_a_teacher_are_in_the_dtype_of_the_computation_and_vectors_in_float32(student):
    config = saved_config(student[1] / "whole")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
    teacher = open_teacher(config, mesh := meshes.make_mesh(config, jax.devices()[:1]))
    read = tree.flatten(read_params(config, teacher))
    exact = Checkpoints(student[1] / "teacher" / "checkpoints", keep=9).restore_params(
        train_state.abstract_state(config, pipeline.spec(config), mesh).params, 1
    )
    for name, leaf in tree.flatten(exact).items():
        dtype = jnp.float32 if name.endswith("scale") else jnp.bfloat16
        assert read[name].dtype == dtype == tree.flatten(teacher.abstract)[name].dtype, name
        np.testing.assert_array_equal(read[name], leaf.astype(dtype), err_msg=name)
