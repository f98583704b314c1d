"""Eight fake CPU devices, one compilation cache, and small real things that the tests share."""

import contextlib
import dataclasses
import gc
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jaxlib.version import __version_info__ as jaxlib_version

# Compiling is most of the suite's time, and most of that LLVM's: code for a few steps of a tiny model need not be fast.
# XLA's own passes, which sharding, donation and memory depend on, are the same at level 0. Code is not split among
# threads either: each core has a test of its own. jaxlib 0.11 always uses the fusion emitters, and refuses the flag.
os.environ["XLA_FLAGS"] = (
    os.environ["XLA_FLAGS"]  # a worker of xdist has them already
    if "--xla_backend_optimization_level=0 " in os.environ.get("XLA_FLAGS", "")
    else "--xla_backend_optimization_level=0 "
    f"{'' if jaxlib_version >= (0, 11) else '--xla_cpu_use_fusion_emitters=false '}"
    "--xla_cpu_parallel_codegen_split_count=1 "
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import numpy as np
import pytest
from shared_directories import made_once

from t5like.cli import main as cli
from t5like.config import loader
from t5like.config.schema import Config, MeshConfig
from t5like.data.objectives import text_rows
from t5like.data.objectives.denoisers import denoisers
from t5like.data.objectives.windows import Denoiser, TextWindows
from t5like.data.tokenizers.vocabulary import Vocabulary
from t5like.interop.huggingface import logits_check
from t5like.optim import train_state
from t5like.sharding import allocator
from t5like.sharding import mesh as meshes
from t5like.types import Batch, TrainState

jax.config.update("jax_numpy_rank_promotion", "raise")
allocator.keep_freed()  # as `t5like` does
allocator.trimmed = contextlib.nullcontext  # one command compiles one step, a session hundreds

SMALL = {
    "tokenizer": {"vocab_size": 500, "num_sentinels": 20},
    "data": {"batch_size": 8, "inputs_length": 32, "targets_length": 12},
    "model": {"num_layers": 2, "model_dim": 32, "num_heads": 4, "head_dim": 8, "mlp_dim": 64},
    "optimizer": {"name": "adamw", "learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 0},
    "train": {"num_steps": 20},
}


def small(**sections: dict) -> Config:
    """A small float32 config; keyword arguments change fields section by section."""
    values = {name: {**SMALL.get(name, {}), **sections.get(name, {})} for name in {*SMALL, *sections} - {"seed"}}
    values["model"] = {"dtype": "float32", "layers": "unroll", **values["model"]}
    natural = {"decoder": "causal_lm", "encoder": "mlm"}
    if (architecture := values["model"].get("architecture")) in natural:
        values["data"] = {"objective": natural[architecture], **values["data"]}
    objective = values["data"].get("objective", ())
    if "mlm_nsp" in ([objective] if isinstance(objective, str) else objective):
        values["model"] = {"token_types": 2, **values["model"]}
    return loader.resolve({**values, **({"seed": sections["seed"]} if "seed" in sections else {})})


def random_batch(config: Config, seed: int = 0) -> Batch:
    """A real objective's batch on random tokens, documents of about 9 tokens if the config minds borders."""
    return denoised_batch(config, denoisers(config)[0], seed)


def denoised_batch(config: Config, denoiser: Denoiser, seed: int = 0) -> Batch:
    """The rows of one denoiser, as `random_batch` makes them."""
    rng = np.random.default_rng(seed)
    shape = (config.data.batch_size, denoiser.window.length)
    tokens_BT = rng.integers(3, config.tokenizer.vocab_size - config.tokenizer.num_sentinels, shape, dtype=np.int32)
    segments_BT = None
    if not config.data.cross_document_attention:
        segments_BT = (1 + np.cumsum(rng.random(shape) < 1 / 9, axis=1)).astype(np.int32)
    keys_B = rng.integers(0, 2**63, shape[0]).astype(np.uint64)
    follows_B = None
    if denoiser.objective == "mlm_nsp":  # every other row is short
        place = np.arange(shape[1])[None]
        ends = np.where(np.arange(shape[0]) % 2, shape[1], shape[1] * 2 // 3)[:, None]
        segments_BT = (place < ends) * (1 + (place >= ends // 2)).astype(np.int32)
        follows_B = rng.integers(0, 2, shape[0])
    text = TextWindows(tokens_BT, segments_BT, keys_B, follows_B)
    return text_rows.make_rows(config, denoiser, vocabulary_of(config), text)


def vocabulary_of(config: Config) -> Vocabulary:
    """A vocabulary of the config's size: pad, EOS, unknown, text, sentinels counting down from the highest id."""
    size, count = config.tokenizer.vocab_size, config.tokenizer.num_sentinels
    ordinary_V = np.arange(size) >= 3
    ordinary_V[size - count :] = False
    return Vocabulary(
        1, np.arange(size - 1, size - 1 - count, -1, dtype=np.int32), ordinary_V, np.arange(size) % 3 == 0
    )


BEGINNINGS: dict[tuple, TrainState] = {}


def begun(config: Config, batch: Batch, abstract: TrainState) -> TrainState:
    """`step.new_state`, made once for all meshes and batches, on one device, and copied to where `abstract` says.

    It depends on model, optimizer and seed alone (test_step.py shows it), and takes long to compile.
    """
    key = (config.model, config.optimizer, config.tokenizer, config.seed, config.lora)
    if key not in BEGINNINGS:
        alone = dataclasses.replace(config, mesh=MeshConfig())
        place = train_state.abstract_state(alone, batch, meshes.make_mesh(alone, jax.devices()[:1]))
        BEGINNINGS[key] = jax.device_get(train_state.new_state(alone, batch, place))
    return jax.tree.map(lambda leaf, like: jax.device_put(np.array(leaf), like.sharding), BEGINNINGS[key], abstract)


def pytest_collection_finish():
    """Collect garbage rarely, and not among all that was imported: traces make many objects, few of them in cycles."""
    gc.collect()
    gc.freeze()
    cli.collect_garbage_rarely()


@pytest.fixture(scope="session", autouse=True)
def exports_without_transformers(request) -> Iterator[None]:
    """Exports compare no logits, as where `make parity` has not installed transformers; tests/live compares them.

    For the session: a shared fixture that exports begins before those of its tests.
    """
    if any("live" in item.path.parts for item in request.session.items):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logits_check, "compare", lambda *_: "transformers is not installed: logits not compared")
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# ---- Text, and the smallest run on it ----

SYLLABLES = [
    "ba",
    "de",
    "fi",
    "go",
    "hu",
    "ka",
    "le",
    "mi",
    "no",
    "pu",
    "ra",
    "se",
    "ti",
    "vo",
    "wu",
    "xa",
    "ye",
    "zi",
    "cho",
    "tre",
    "sla",
    "qui",
    "ven",
    "dor",
    "mal",
    "pis",
]


def write_text(path: Path, lines: int = 600, seed: int = 0) -> None:
    """A file of sentences of 100 random words, some of them frequent: a tiny model can learn something from it."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(SYLLABLES, rng.integers(1, 4))) for _ in range(100)]
    places = lambda: np.minimum(rng.exponential(20, rng.integers(6, 20)), 99).astype(int)
    path.write_text("".join(" ".join(words[place] for place in places()) + ".\n" for _ in range(lines)))


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a.txt and b.txt, a line a document."""

    def write(directory: Path) -> None:
        write_text(directory / "a.txt", seed=1)
        write_text(directory / "b.txt", lines=300, seed=2)

    return made_once(tmp_path_factory, "texts", write)


@pytest.fixture(scope="session")
def flags(texts: Path) -> list[str]:
    """Flags of `t5like train` for the smallest run on a.txt; later flags win over these."""
    return smallest_flags(texts)


def smallest_flags(texts: Path) -> list[str]:
    """The flags of `flags`, for a directory with a.txt."""
    values = {
        "tokenizer.vocab_size": 400,
        "tokenizer.num_sentinels": 20,
        "data.source": f"text:{texts}/a.txt",
        "data.text_documents": "line",
        "data.heldout_fraction": 0.1,
        "data.cache_directory": texts / "prepared",
        "data.batch_size": 8,
        "data.inputs_length": 32,
        "data.targets_length": 12,
        "model.num_layers": 1,
        "model.model_dim": 32,
        "model.num_heads": 2,
        "model.head_dim": 16,
        "model.mlp_dim": 64,
        "optimizer.name": "adamw",
        "optimizer.learning_rate": 0.01,
        "optimizer.schedule": "constant",
        "optimizer.warmup_steps": 0,
        "train.num_steps": 12,
        "train.log_every": 1,
        "train.eval_every": 100,
        "train.early_evals": 0,
        "train.checkpoint_every": 100,
    }
    return ["--config=configs/tiny.py", *(f"--config.{name}={value}" for name, value in values.items())]


def main(arguments: Sequence[str]) -> int:
    """Run a command line in this process, on the devices that it would have in its own: one, or `--fake_devices`."""
    counts = re.findall(r"--fake_devices=([1-8])(?!\S)", " ".join(arguments))
    with first_devices(int(counts[-1]) if counts else 1):
        return cli.main(arguments)


@contextlib.contextmanager
def first_devices(count: int) -> Iterator[None]:
    """Let JAX show only so many devices: a program for one compiles in half the time, as it needs no partitioning."""

    def first(show: Callable) -> Callable:
        return lambda *args, **kwargs: show(*args, **kwargs)[:count]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", first(jax.devices))
        patch.setattr(jax, "local_devices", first(jax.local_devices))
        patch.setattr(jax, "device_count", lambda *_: count)
        patch.setattr(jax, "local_device_count", lambda *_: count)
        yield


@pytest.fixture
def command(capfd, monkeypatch):
    """Run a command line in this process: its exit code, and what it wrote to stdout and stderr."""
    for name in ("XLA_FLAGS", "JAX_PLATFORMS"):  # --fake_devices sets them for its process, which this one is not
        monkeypatch.setenv(name, os.environ.get(name, ""))

    def run(*arguments) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def refused(command):
    """Run a command line that must be refused: checks the form, gives (exit code, message)."""

    def run(*arguments) -> tuple[int, str]:
        code, _, err = command(*arguments)
        *before, last = err.splitlines()
        assert last.startswith("t5like: ") and not re.search("Traceback|WARNING|Error\\b", "\n".join(before)), err
        return code, last.removeprefix("t5like: ")

    return run


@pytest.fixture(scope="session")
def trained(flags, tmp_path_factory) -> Path:
    """A finished run of 2 steps with checkpoints at 1 and 2. Read it, copy it, but leave it as it is."""
    settings = ["--config.train.num_steps=2", "--config.train.checkpoint_every=1"]
    return made_once(tmp_path_factory, "trained", lambda place: run_at(place, [*flags, *settings])) / "run"


ENCODER_DECODER = {  # the fields in which a model of `flags` differs from that of `DECODER`
    "model.architecture": "encoder_decoder",
    "model.positions": "relative",
    "model.mlp": "gated_gelu",
    "model.scale_attention": False,
}
DECODER = {  # as Llama
    "model.architecture": "decoder",
    "model.positions": "rotary",
    "model.mlp": "gated_silu",
    "model.scale_attention": True,
}


@pytest.fixture(scope="session")
def decoder_flags(flags) -> list[str]:
    """`flags` for a decoder, whose programs take half as long to compile; tests that train it share its step."""
    return [*flags, *(f"--config.{name}={value}" for name, value in {**DECODER, "data.objective": "causal_lm"}.items())]


@pytest.fixture(scope="session")
def trained_decoder(decoder_flags, tmp_path_factory) -> Path:
    """`trained` with a decoder."""
    flags = [*decoder_flags, "--config.train.num_steps=2", "--config.train.checkpoint_every=1"]
    return made_once(tmp_path_factory, "trained_decoder", lambda place: run_at(place, flags)) / "run"


@pytest.fixture(scope="session")
def rl_flags(flags, trained_decoder, tmp_path_factory) -> list[str]:
    """Flags of `t5like rl` for 4 steps of sorting letters, from the run `trained_decoder`; later flags win."""
    place = made_once(tmp_path_factory, "letters", lambda place: write_letters(place / "sort.jsonl"))
    values = {
        "init_from.checkpoint": trained_decoder,
        **DECODER,
        "data.source": f"jsonl:{place}/sort.jsonl",
        "data.objective": "supervised",
        "data.batch_size": 8,
        "train.num_steps": 4,
        "train.checkpoint_every": 2,
        "rl.method": "policy",
        "rl.rewards": "regex:[aeiou]",  # the answers of an untrained model differ in it
        "rl.reward_workers": 1,
        "rl.answers_per_prompt": 3,
        "rl.eval_prompts": 3,
        "rl.table_every": 1,
    }
    return [*flags, *(f"--config.{name}={value}" for name, value in values.items())]


def write_letters(path: Path, lines: int = 40) -> None:
    """Letters to sort, with the right answer and a wrong one."""
    rng, records = np.random.default_rng(0), []
    for _ in range(lines):
        letters = rng.choice(list("abcdefg"), rng.integers(2, 6)).tolist()
        right, given = " ".join(sorted(letters)), " ".join(letters)
        records.append({"inputs": f"sort {given}", "targets": right, "chosen": right, "rejected": given + " a"})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def run_at(place: Path, flags: list[str]) -> None:
    """Train to the end in place/run."""
    assert main(["train", *flags, f"--workdir={place}/run"]) == 0


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }
