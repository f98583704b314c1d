"""Config: types, ranges, checks, flags, saving and loading; and every preset."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest

from t5like.config import checks, formats, loader
from t5like.config.model_schema import ModelConfig
from t5like.config.schema import ARCHITECTURES, Config, Objective, OptimizerConfig, sections
from t5like.data import pipeline
from t5like.data.objectives.denoisers import denoisers
from t5like.errors import ConfigError
from t5like.model import mlp, stack
from t5like.optim.optimizers import make_optimizer
from t5like.optim.schedules import learning_rate

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.py"))


# ---- Presets ----


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_preset_loads_and_is_equal_after_saving(path):
    config = loader.load(path)
    assert loader.from_json(loader.to_json(config)) == config
    batch = pipeline.spec(config)
    assert batch.targets_BL.shape[0] == config.data.batch_size
    for step in (0, 1, config.train.num_steps // 2, config.train.num_steps - 1):
        assert 0 <= float(learning_rate(config)(step)) <= config.optimizer.learning_rate * (1 + 1e-6)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_docstring_of_each_preset_has_its_command(path):
    command, name = "train" if loader.load(path).rl.method == "none" else "rl", path.relative_to(CONFIGS).as_posix()
    assert f"t5like {command} --config=configs/{name} --workdir=" in path.read_text().split('"""')[1]


def test_t5_small_has_the_published_row_lengths():
    config = loader.load(Path(__file__).parents[2] / "configs" / "t5_small.py")
    assert pipeline.spec(config).encoder_BS.shape == (2048, 512) and pipeline.spec(config).targets_BL.shape == (
        2048,
        114,
    )
    assert denoisers(config)[0].window.length == 568 and config.vocab_rows == 32_128


# ---- Enumerated fields ----


def test_every_value_of_an_enumerated_field_is_implemented():
    def choices(cls: type, field: str) -> set[str]:
        return set(get_args(get_type_hints(cls)[field]))

    assert set(get_args(Objective)) == set(ARCHITECTURES)
    for objective, architectures in ARCHITECTURES.items():
        of_labels = objective in ("classification", "token_classification")
        for architecture in architectures:
            config = loader.resolve(
                {
                    "data": {"objective": objective, "targets_length": 512, "labels": ["a", "b"] if of_labels else []},
                    "model": {"architecture": architecture, "token_types": 2 * (architecture == "encoder")},
                    "tokenizer": {"num_sentinels": 200},
                }
            )
            assert config.data.has_examples or denoisers(config)
    assert choices(ModelConfig, "mlp") == set(mlp.ACTIVATIONS)
    assert choices(ModelConfig, "remat") == {"none", *stack.REMAT}
    for name in choices(OptimizerConfig, "schedule"):
        config = loader.resolve(
            {"optimizer": {"schedule": name, "decay_steps": 5, "warmup_steps": 2}, "train": {"num_steps": 20}}
        )
        assert all(math.isfinite(learning_rate(config)(step)) for step in range(20)), name
    for name in choices(OptimizerConfig, "name"):
        assert make_optimizer(
            loader.resolve({"optimizer": {"name": name}}),
            {"layers": {"mlp": {"kernel": np.ones((1, 4, 4)), "bias": np.ones((1, 4))}}},
            {"layers/mlp/kernel": ("layers", "embed", "mlp"), "layers/mlp/bias": ("layers", "mlp")},
        ), name


# ---- Checks ----


@pytest.mark.parametrize(
    "values, message",
    [
        ({"train": {"num_step": 1}}, "train.num_step: there is no field 'num_step'; did you mean 'num_steps'?"),
        ({"trian": {}}, "trian: there is no field 'trian'; did you mean 'train'?"),
        ({"zzz": 1}, "zzz: there is no field 'zzz'; there are seed, tokenizer, data, model, optimizer, train, mesh"),
        ({"train": 3}, "train=3 must be a section with the fields num_steps, "),
        ({"train": {"num_steps": "10"}}, "train.num_steps='10' must be a whole number"),
        ({"train": {"num_steps": 10.0}}, "train.num_steps=10.0 must be a whole number"),
        ({"train": {"num_steps": True}}, "train.num_steps=True must be a whole number"),
        ({"model": {"biases": 1}}, "model.biases=1 must be true or false"),
        ({"data": {"source": [1]}}, "data.source=1 must be a string"),
        ({"data": {"source": None}}, "data.source=None must be a list of strings"),
        ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate=nan must be a finite number"),
        (
            {"optimizer": {"name": "adam"}},
            "optimizer.name='adam' must be one of adafactor, adamw, adamw_rms, stable_adamw, lion, muon; did you mean",
        ),
        ({"data": {"batch_size": 0}}, "data.batch_size=0 must be at least 1"),
        ({"data": {"noise_density": 1.0}}, "data.noise_density=1.0 must be more than 0 and less than 1; use 0.15"),
        (
            {"data": {"rates": (1, 2)}},
            "data.rates=(1.0, 2.0) must have one rate for each of the 1 in data.source, or be empty",
        ),
        (
            {"data": {"objective": "mlm"}},
            "data.objective=mlm needs model.architecture=encoder, not encoder_decoder",
        ),
        ({"model": {"num_heads": 6, "num_kv_heads": 4}}, "model.num_kv_heads=4 must divide model.num_heads=6; use 2"),
        (
            {"model": {"positions": "learned", "max_length": 100}},
            "model.max_length=100 must be at least the longest row, 512, with learned positions; use 512",
        ),
        (
            {
                "model": {"positions": "learned", "max_length": 100, "architecture": "encoder"},
                "data": {"objective": "mlm", "inputs_length": 101},
            },
            "model.max_length=100 must be at least the longest row, 101, with learned positions; use 101",
        ),
        (
            {"model": {"token_types": 2}},
            "model.token_types=2 needs model.architecture=encoder, not encoder_decoder; use 0",
        ),
        (
            {"model": {"head": "mlm"}},
            "model.head='mlm' needs model.architecture=encoder, not encoder_decoder; use plain",
        ),
        (
            {"model": {"architecture": "encoder", "token_types": 1}, "data": {"objective": ("mlm", "mlm_nsp")}},
            "model.token_types=1 must be at least 2 for data.objective=mlm_nsp; use 2",
        ),
        ({"train": {"microbatches": 3}}, "data.batch_size=128 must be a multiple of train.microbatches=3; use 129"),
        (
            {"tokenizer": {"vocab_size": 500, "num_sentinels": 20, "extra_eos_ids": (2, 500)}},
            "tokenizer.extra_eos_ids=(2, 500) must be token ids, at least 0 and less than tokenizer.vocab_size=500",
        ),
        (
            {"tokenizer": {"vocab_size": 300}},
            "tokenizer.vocab_size=300 must be more than 359 (3 special ids, 256 bytes, 100 sentinels); use 1359",
        ),
        ({"data": {"messages_field": "m"}}, "data.messages_field='m' needs data.objective=supervised"),
        ({"data": {"inputs_template": "{x}"}}, "data.inputs_template='{x}' needs data.objective=supervised"),
        ({"data": {"whole_word_masking": True}}, "data.whole_word_masking=True needs data.objective=mlm or mlm_nsp"),
        ({"init_from": {"reinitialize": "head"}}, "init_from.reinitialize=('head',) needs init_from.checkpoint"),
        (
            {"data": {"objective": ("prefix_lm", "prefix_lm")}},
            "data.objective=('prefix_lm', 'prefix_lm') must not name an objective twice",
        ),
        (
            {"data": {"objective": "supervised", "messages_field": "m", "targets_template": "{x}"}},
            "data.targets_template='{x}' can't be combined with data.messages_field",
        ),
        (
            {"data": {"objective": "supervised"}, "evaluate": {"answer_choices": ("a", "b")}},
            "evaluate.answer_choices=('a', 'b') need evaluate.metrics; use accuracy",
        ),
        (
            {"data": {"objective": ("span_corruption", "ul2"), "objective_rates": (0, 0)}},
            "data.objective_rates=(0.0, 0.0) must not sum to 0; use 1,1",
        ),
        (
            {"data": {"phase_boundaries": (5,), "rates": (1, 0)}},
            "data.rates=(1.0, 0.0) must not sum to 0 in any phase; use 1,1",
        ),
        (
            {"data": {"phase_boundaries": (5, 5)}},
            "data.phase_boundaries=(5, 5) must be steps in ascending order; use 1000,2000",
        ),
        (
            {"data": {"objective": "mlm", "phase_noise_density": (0.3, 0.1)}, "model": {"architecture": "encoder"}},
            "data.phase_noise_density=(0.3, 0.1) must have one value for each of the 1 phases of data.phase_boundaries",
        ),
        (
            {"data": {"phase_noise_density": (0.3,)}},
            "data.phase_noise_density=(0.3,) needs data.objective=mlm, not span_corruption; use data.noise_density",
        ),
        ({"mesh": {"fsdp": -1}}, "mesh.data=-1 and mesh.fsdp=-1: only one axis can be -1; use mesh.fsdp=1"),
        ({"mesh": {"tensor": 0}}, "mesh.tensor=0 must be at least 1, or -1 for the remaining devices"),
        ({"mesh": {"data": -2}}, "mesh.data=-2 must be at least -1 and at most 1,048,576; use -1"),
        (
            {"data": {"phase_boundaries": (5, -1), "rates": ()}},
            "data.phase_boundaries=-1 must be at least 1 and at most ",
        ),
        ({"data": {"rates": (1e30,)}}, "data.rates=1e+30 must be at least 0 and at most 1e+09"),
        ({"data": {"rates": (1e-30,)}}, "data.rates=(1e-30,) must be 0 or at least 1e-09"),
        ({"model": {"model_dim": 10**12}}, "model.model_dim=1000000000000 must be at least 1 and at most 1,048,576"),
        ({"model": {"num_layers": 10**9}}, "model.num_layers=1000000000 must be at least 1 and at most 1,000; use 8"),
        ({"data": {"batch_size": 10**5000}}, "data.batch_size=a number of thousands of digits must be at least 1"),
        ({"optimizer": {"learning_rate": 10**400}}, "optimizer.learning_rate=1000"),
        ({"data": {"split": "a\0"}}, "data.split='a\\x00' must be UTF-8 text without NUL characters"),
        ({"data": {"cache_directory": "/tmp/\udcff"}}, "data.cache_directory='/tmp/\\udcff' must be UTF-8 text"),
        (
            {"data": {"cache_directory": "~nobody-known/x"}},
            "data.cache_directory=~nobody-known/x names a home directory that",
        ),
        ({"init_from": {"checkpoint": "~nobody-known/x"}}, "init_from.checkpoint=~nobody-known/x names a home"),
        ({3: 4}, "3: there is no field 3; there are seed, tokenizer"),
        ({"a\nb": 4}, "'a\\nb': there is no field 'a\\nb'; there are seed, tokenizer"),
        ({"model": {"mlp": 10**5000}}, "model.mlp=a number of thousands of digits must be one of relu, gelu"),
        ({"model": {"mlp": ["relu"]}}, "model.mlp=['relu'] must be one of relu, gelu"),
    ],
)
def test_a_wrong_config_is_refused_with_field_value_and_rule(values, message):
    with pytest.raises(ConfigError) as refusal:
        loader.resolve(values)
    assert str(refusal.value).startswith(message) and "\n" not in str(refusal.value)


NUMBERS = [
    (prefix, field.name, cls)
    for prefix, cls in sections()
    for field in dataclasses.fields(cls)
    if get_type_hints(cls)[field.name] in (int, float, tuple[int, ...], tuple[float, ...])
]


def test_every_number_has_a_range_at_its_field_with_its_default_inside():
    for prefix, name, cls in NUMBERS:
        limits, default = checks.ranges(cls)[name]
        assert default == () or default in limits, (prefix, name)
        many, wrong = isinstance(default, tuple), [1e300]
        wrong += [float("-inf"), limits.least - 1] if limits.least is not None else []
        wrong += [end for end in (limits.above, limits.below) if end is not None]
        whole = isinstance(default, int) or name in ("phase_boundaries", "extra_eos_ids")
        for value in [int(value) for value in wrong if math.isfinite(value)] if whole else wrong:
            values = {name: (value,) if many else value}
            for section in reversed(prefix.split(".")[:-1]):
                values = {section: values}
            with pytest.raises(ConfigError, match=f"^{prefix}{name}=.* must be (at|more|a finite)"):
                loader.resolve(values)


def test_an_old_name_of_a_field_is_refused_with_the_new_one(tmp_path):
    borders = "data.document_borders is now data.cross_document_attention; use true for concatenate, false for segments"
    for name, text, message in (
        ("data.change_steps", "5", "data.change_steps is now data.phase_boundaries"),
        ("model.rotary_base", "5", "model.rotary_base is now model.rotary.base"),
        ("data.document_borders", "segments", borders),
    ):
        with pytest.raises(ConfigError) as refusal:
            loader.override({}, name, text)
        assert str(refusal.value) == message
        section, field = name.split(".")
        with pytest.raises(ConfigError) as refusal:
            loader.resolve({section: {field: text}})
        assert str(refusal.value) == message
        path, start = tmp_path / "mine.py", "from t5like import config\n\ndef get_config():\n    c = config.default()\n"
        for change in (f"c.{name} = 5", f"c.{section}.update({field}=5)", f"c.{section}['{field}'] = 5"):
            path.write_text(f"{start}    {change}\n    return c\n")
            with pytest.raises(ConfigError) as refusal:
                loader.load(path)
            assert str(refusal.value) == f"--config={path}: {message}"


def test_an_unknown_name_in_a_config_file_is_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from t5like import config\n\ndef get_config():\n    c = config.default()\n"
        "    c.train.num_step = 3\n    return c\n"
    )
    with pytest.raises(ConfigError, match="num_steps"):
        loader.load(path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("def get_config(:\n", "invalid syntax"),
        ("import nosuchmodule\n", "nosuchmodule"),
        ("x = 1\n", "get_config"),
        ("def get_config():\n    return 3\n", "must return a ConfigDict, not int"),
        ("def get_config():\n    return 1 / 0\n", "division by zero"),
        ("import sys\nsys.exit(0)\n", "ended the program by sys.exit(0); define get_config() and return"),
        ("def get_config():\n    raise SystemExit\n", "ended the program by sys.exit(None)"),
        ("def get_config():\n    return get_config()\n", "RecursionError: maximum recursion depth"),
        ("def get_config():\n    raise ValueError('x' * 10_000)\n", "xxx"),
        ("def get_config():\n    return {}['new']\n", "failed: KeyError: 'new'"),  # no field of a config
        ("\0", "source code string cannot contain null bytes"),
        ("def get_config():\n    c = {}\n    c['train'] = c\n    return c\n", "train.train: there is no field"),
    ],
)
def test_a_broken_config_file_is_refused_in_one_line_with_its_name(text, message, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as refusal:
        loader.load(path)
    if "train.train" not in message:
        assert str(path) in str(refusal.value)
    assert message in str(refusal.value) and "\n" not in str(refusal.value) and len(str(refusal.value)) < 1000


def test_a_config_file_prints_to_standard_error(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("print('hello')\ndef get_config():\n    return {'seed': 3}\n")
    assert loader.load(tmp_path / "mine.py").seed == 3
    assert capsys.readouterr() == ("", "hello\n")


# ---- Flags ----


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("train.num_steps", "12", 12),
        ("train.num_steps", "1_000", 1000),
        ("train.num_steps", "1e6", 1_000_000),
        ("mesh.data", "-1", -1),
        ("optimizer.learning_rate", "1e-3", 1e-3),
        ("optimizer.learning_rate", "1", 1.0),
        ("model.biases", "true", True),
        ("model.biases", "False", False),
        ("model.biases", "1", True),
        ("data.source", "text:a,text:b", ("text:a", "text:b")),
        ("data.rates", "1,2.5", (1.0, 2.5)),
        ("data.rates", "", ()),
        ("optimizer.no_decay", ".*bias", (".*bias",)),
        ("data.cache_directory", "", ""),
        ("model.rotary.base", "5e5", 5e5),
        ("seed", "7", 7),
        ("model.mlp", "relu", "relu"),
    ],
)
def test_a_flag_has_the_type_of_its_field(name, text, value):
    values = {}
    loader.override(values, name, text)
    read = functools.reduce(dict.get, name.split("."), values)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("train.num_steps", "1.5", "train.num_steps='1.5' must be a whole number"),
        ("train.num_steps", "1.5e0", "train.num_steps='1.5e0' must be a whole number; use 900"),  # as in the preset
        ("train.num_steps", "1e999", "train.num_steps='1e999' must be a whole number"),
        ("train.num_steps", "", "train.num_steps='' must be a whole number"),
        ("train.num_steps", "-5", "train.num_steps=-5 must be at least 1 and at most 2,147,483,647; use 900"),
        ("model.biases", "maybe", "model.biases='maybe' must be true or false; use False"),
        ("model.rotary.base", "-1", "model.rotary.base=-1.0 must be at least 1 and at most 1e+12; use 10000.0"),
        ("optimizer.learning_rate", "nan", "optimizer.learning_rate=nan must be a finite number; use 0.005"),
        ("data.rates", "1,x", "data.rates='x' must be a finite number"),
        ("train.numsteps", "1", "--config.train.numsteps: there is no field 'numsteps'; did you mean 'num_steps'?"),
        ("tain.num_steps", "1", "--config.tain.num_steps: there is no field 'tain'; did you mean 'train'?"),
        ("train", "1", "--config.train is a section; set one of its fields: num_steps, "),
        ("seed.x", "1", "--config.seed.x: 'seed' is a field, not a section; use --config.seed=VALUE"),
    ],
)
def test_a_flag_of_the_wrong_type_or_name_is_refused(name, text, message):
    with pytest.raises(ConfigError) as refusal:
        loader.load("tiny", [(name, text)])
    assert str(refusal.value).startswith(message)


def test_later_flags_override_earlier_ones_and_the_file():
    config = loader.load(FILES[-1], [("train.num_steps", "5"), ("train.num_steps", "6")])
    assert config.train.num_steps == 6


# ---- Saved ----


def test_a_saved_config_has_every_field_and_is_checked(tmp_path):
    saved = json.loads(loader.to_json(Config(seed=3)))
    assert saved["seed"] == 3 and set(saved["model"]) == {field.name for field in dataclasses.fields(ModelConfig)}
    with pytest.raises(ConfigError, match="did you mean 'seed'"):
        loader.from_json(json.dumps({**saved, "sed": 1}))
    newer = formats.FORMAT + 1
    with pytest.raises(ConfigError, match=f"format={newer} is newer than {newer - 1}, which t5like .* reads; install"):
        loader.from_json(json.dumps({**saved, "format": newer}))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "[" * 100_000, '{"format": 3, "seed": 1, "seed": 2}', '{"a": NaN}', b"\xff"]
)
def test_a_damaged_saved_config_is_refused(text):
    with pytest.raises(ConfigError, match="not a saved config"):
        loader.from_json(text)


def test_differences_are_listed_field_by_field():
    old, new = Config(), loader.resolve({"seed": 1, "model": {"mlp": "relu"}})
    assert loader.difference(old, new) == ["seed: 0 -> 1", "model.mlp: 'gated_gelu' -> 'relu'"]
    assert loader.difference(old, Config()) == []
