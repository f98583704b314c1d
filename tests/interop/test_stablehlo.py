"""StableHLO exports: results of the programs, running without t5like, portability, refusals."""

import contextlib
import dataclasses
import io
import json
import os
import re
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest
from conftest import SYLLABLES, main, small
from one_device import XLA_FLAGS

from t5like import tree
from t5like.checkpoint import run_directory
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.errors import CheckpointError
from t5like.inference.generate import Generator
from t5like.interop import stablehlo, stablehlo_run
from t5like.interop.stablehlo import export_run, exported_program, portable, programs
from t5like.model.transformer import Transformer
from t5like.optim import train_state
from t5like.types import Batch

PROMPT = f"{SYLLABLES[0]}{SYLLABLES[3]} <extra_id_0> {SYLLABLES[5]}."


@pytest.fixture(scope="module")
def ending(trained, tmp_path_factory):
    """A run with the weights of `trained`, whose answer to PROMPT ends at once, with a second end-of-sequence id."""
    loaded, workdir = run_directory.load(trained), tmp_path_factory.mktemp("ending") / "run"
    generator = Generator(loaded.config, loaded.params, loaded.tokenizer)
    end = int(generator.ids([generator.prompt(PROMPT)], max_new_tokens=8)[0, 0])
    tokenizer = dataclasses.replace(loaded.config.tokenizer, extra_eos_ids=(end,))
    config = dataclasses.replace(run_directory.saved_config(trained), tokenizer=tokenizer)
    run_directory.write_imported(loaded.params, config, loaded.tokenizer, workdir)
    return workdir


@pytest.fixture(scope="module")
def exported(ending, tmp_path_factory):
    """The export of an encoder-decoder, for eight new tokens."""
    output = tmp_path_factory.mktemp("export") / "out"
    command = ["export", "--format=stablehlo", f"--workdir={ending}", f"--output={output}", "--max_new_tokens=8"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(command) == 0
    assert "int32[b, 32]" in printed.getvalue().splitlines()[0]
    return output


def run_script(directory, *arguments, cwd) -> str:
    """The output of run.py in an isolated process in another folder that can't import t5like."""
    code = (
        "import sys, runpy; sys.modules['t5like'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(directory / "run.py"), *arguments],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu", "XLA_FLAGS": XLA_FLAGS},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_exported_forward_equals_that_of_the_run_for_any_number_of_rows(exported, trained, rng):
    loaded = run_directory.load(trained)
    program = jax.export.deserialize(bytearray((exported / "forward.jax").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    weights = dict(np.load(exported / "weights.npz"))
    for rows in (1, 3):
        inputs, ids = (rng.integers(3, 380, (rows, length)).astype(np.int32) for length in (32, 12))
        real = (np.arange(32) < rng.integers(5, 33, (rows, 1))).astype(np.int32)
        exported_logits = program.call(weights, inputs, real, ids, np.ones_like(ids))
        batch = Batch(ids, ids, np.ones(ids.shape), inputs, real, np.ones_like(ids))
        logits = jax.jit(Transformer(loaded.config).apply)({"params": loaded.params}, batch)
        np.testing.assert_allclose(exported_logits[..., :400], logits[..., :400], rtol=1e-6, atol=1e-6)
        assert (np.asarray(exported_logits)[..., 400:] < -1e8).all()


def test_run_py_generates_as_t5like_does_where_t5like_is_not_installed(exported, ending, trained, tmp_path):
    loaded = run_directory.load(ending)
    generator = Generator(loaded.config, loaded.params, loaded.tokenizer)
    [answer] = generator([PROMPT], max_new_tokens=8)
    before = run_directory.load(trained)
    [longer] = Generator(before.config, before.params, before.tokenizer)([PROMPT], max_new_tokens=8)
    assert longer.startswith(answer) and longer != answer
    assert run_script(exported, f"--prompt={PROMPT}", cwd=tmp_path).rstrip("\n") == answer
    signature = json.loads((exported / "signature.json").read_text())
    assert signature["tokenizer"]["eos_ids"] == [1, *loaded.config.tokenizer.extra_eos_ids]
    ids = generator.prompt(PROMPT).ids
    row, real = np.array([ids + [0] * (32 - len(ids))], np.int32), np.array([len(ids)], np.int32)
    program = jax.export.deserialize(bytearray((exported / "generate.jax").read_bytes()))
    generated = np.asarray(program.call(dict(np.load(exported / "weights.npz")), row, real))[0]
    np.testing.assert_array_equal(generated, generator.ids([generator.prompt(PROMPT)], max_new_tokens=8)[0])
    run_script(exported, f"--ids={','.join(map(str, ids))}", f"--logits={tmp_path}/logits.npy", cwd=tmp_path)
    row, zero = np.array([ids], np.int32), np.zeros((1, 1), np.int32)
    batch = Batch(zero, zero, np.ones((1, 1)), row)
    logits = jax.jit(Transformer(loaded.config).apply)({"params": loaded.params}, batch)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder"])
@pytest.mark.parametrize(
    "objective", ["ul2", "ul2,prefix_lm", "span_corruption", "prefix_lm,causal_lm", "supervised", "messages"]
)
def test_run_py_builds_the_same_prompt_as_t5like(objective, architecture, trained):
    tokenizer = Tokenizer.load(trained / "tokenizer.model", num_sentinels=20)
    data = {"inputs_length": 128, "targets_length": 128, "objective": tuple(objective.split(","))}
    if objective == "messages":
        data |= {"objective": "supervised", "messages_field": "messages"}
    ids = {"vocab_size": 400, "num_sentinels": 20}
    config = small(model={"architecture": architecture}, data=data, tokenizer=ids)
    script = object.__new__(stablehlo_run.Model)  # without programs
    script.directory, script.architecture = trained, architecture
    script.signature = json.loads(json.dumps(stablehlo.text_signature(config, tokenizer)))
    script.sentinels = script.signature["tokenizer"]["sentinels"]
    generator = Generator(config, None, tokenizer)
    for text in ("ba de", "", "ba <extra_id_0> de", "[S] ba de", "[R]ba <extra_id_0>", "[X] ", "[Y] ba", "a [S] b"):
        assert script.encode(text) == generator.prompt(text), text


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder", "encoder"])
def test_programs_of_every_architecture_are_exported_without_custom_calls(architecture, rng):
    model = {"architecture": architecture, "num_layers": 1, "model_dim": 16, "num_heads": 2, "mlp_dim": 16}
    if architecture == "decoder":
        model |= {"positions": "rotary", "mlp": "gated_silu", "num_kv_heads": 1}
    config = portable(small(model=model), "auto")
    exports = programs(
        config, [1], max_new_tokens=3, prompt_length=8, temperature=0.5 if architecture == "decoder" else 0.0
    )
    batch = Batch(*[None] * 3)._replace(**_rows(architecture))
    boxes = jax.eval_shape(lambda: train_state.init_params(config, batch, jax.random.key(0)))
    shapes = tree.flatten(jax.tree.map(lambda box: box.value, boxes, is_leaf=lambda x: hasattr(x, "names")))
    params = {name: rng.standard_normal(leaf.shape, np.float32) / 4 for name, leaf in shapes.items()}
    for program in exports.values():
        artifact = exported_program(program, shapes)
        assert not artifact.disabled_safety_checks
        calls = set(re.findall(r"custom_call @(\w+)", artifact.mlir_module()))
        assert calls <= {"shape_assertion"}, calls  # resolved by jax before anything is compiled
        assert artifact.platforms == ("cpu", "cuda", "tpu")
        assert "b" in str(artifact.in_avals) and config.model.dtype == "float32"
    if architecture == "encoder_decoder":
        return
    arguments = [stablehlo.example(leaf) for leaf in exports["forward"].arguments.values()]
    ids = rng.integers(3, 400, arguments[0].shape).astype(np.int32)
    forward = jax.export.deserialize(exported_program(exports["forward"], shapes).serialize())
    exported_logits = forward.call(params, ids, *arguments[1:])
    one = np.ones_like(ids)
    batch = Batch(ids, ids, one, prefix_BL=one > 0) if architecture == "decoder" else Batch(None, ids, one, ids, one)
    logits = jax.jit(Transformer(config).apply)({"params": tree.nested(params)}, batch)
    np.testing.assert_allclose(exported_logits, logits, rtol=1e-5, atol=1e-6)


def _rows(architecture: str) -> dict:
    ids = np.ones((1, 4), np.int32)
    encoder = {"encoder_BS": ids} if architecture != "decoder" else {}
    decoder = {"decoder_BL": ids} if architecture != "encoder" else {}
    return {"targets_BL": ids, "weights_BL": ids, **encoder, **decoder}


def test_the_signature_describes_the_files_and_a_damaged_file_is_refused(exported, trained, tmp_path, monkeypatch):
    signature = json.loads((exported / "signature.json").read_text())
    assert signature["programs"]["generate"]["arguments"]["prompt"] == ["int32", ["b", "32"]]
    assert (
        signature["step"] == 0
        and (exported / "tokenizer.model").read_bytes() == (trained / "tokenizer.model").read_bytes()
    )
    save = stablehlo.save_weights
    monkeypatch.setattr(
        stablehlo, "save_weights", lambda path, params: save(path, params | {"head": params["head"] * 2})
    )
    with pytest.raises(CheckpointError, match="head was not written correctly"):
        list(export_run(trained, tmp_path / "out", max_new_tokens=8))
    assert list(tmp_path.iterdir()) == []


def test_the_command_refuses_an_existing_output(command, trained, exported):
    arguments = ["export", "--format=stablehlo", f"--workdir={trained}", f"--output={exported}"]
    code, _, err = command(*arguments)
    assert code == 2 and "is not an empty directory" in err
    assert command(*arguments, "--max_new_tokens=0")[0] == 2
