"""Files that were changed on disk are refused in one line: token stores, checkpoints, run directories."""

import dataclasses
import hashlib
import json
import re
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import contents

from t5like.checkpoint.checkpoints import Checkpoints
from t5like.config import loader
from t5like.config.schema import Config
from t5like.data.store import preparation
from t5like.data.store.manifest import add_checksum
from t5like.data.store.token_store import StoredFile, TokenStore
from t5like.data.store.verification import Verification
from t5like.errors import DataError
from t5like.types import TrainState

NESTED = b"[" * 100_000


def flip(raw: bytes) -> bytes:
    middle = len(raw) // 2 & ~1
    return raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :]


def zeros(raw: bytes) -> bytes:
    return raw[:10] + bytes(len(raw) - 10)


# ---- Token stores ----


@pytest.fixture
def own(trained, tmp_path) -> Config:
    """The config of a finished run, with a copy of its data."""
    config = loader.from_json((trained / "config.json").read_text())
    prepared = preparation.prepare(config, progress=False)
    for kind, path in (("stores", prepared.stores[0].directory), ("tokenizers", prepared.tokenizer_path.parent)):
        shutil.copytree(path, tmp_path / "prepared" / kind / path.name)
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, cache_directory=str(tmp_path / "prepared"))
    )


def store_of(config: Config) -> Path:
    return next(path for path in Path(config.data.cache_directory).glob("stores/*"))


def verified(config: Config) -> None:
    Verification(preparation.prepare(config, progress=False).stores)


def rewritten(store: Path, change, *, seal: bool = False) -> None:
    """Change a manifest; its checksum then is right (seal), or gone as in an older store."""
    path = store / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("sha256", None)
    change(manifest)
    path.write_text(json.dumps(add_checksum(manifest) if seal else manifest))


DAMAGED_FILES = [
    (
        "00000.train.tokens",
        flip,
        r"00000\.train\.tokens is damaged \(sha256 differs\); remove .*/manifest\.json to prep",
    ),
    ("00000.train.tokens", zeros, r"00000\.train\.tokens is damaged"),
    ("00000.train.ends", flip, r"00000\.train\.ends is damaged"),
    ("00000.heldout.tokens", flip, r"00000\.heldout\.tokens is damaged"),
    ("00000.heldout.ends", zeros, r"00000\.heldout\.ends is damaged"),
    (
        "00000.train.tokens",
        lambda raw: raw[: len(raw) // 2],
        r"00000\.train\.tokens has \d+ bytes instead of \d+; remove",
    ),
    ("00000.train.tokens", lambda raw: raw + b"\0\0", r"00000\.train\.tokens has \d+ bytes instead of \d+; remove"),
    ("00000.train.tokens", None, r"00000\.train\.tokens can't be read: No such file"),
    ("../manifest.json", flip, r"manifest\.json is damaged: "),
    ("../manifest.json", lambda _: b"", r"manifest\.json is damaged: it is not JSON; remove"),
    ("../manifest.json", lambda _: NESTED, r"manifest\.json is damaged: it is not JSON; remove"),
    ("../manifest.json", lambda _: b"\xff\xfe", r"manifest\.json is damaged: it is not JSON; remove"),
    ("../manifest.json", lambda _: b"[]", r"manifest\.json is damaged: it is not a JSON object; remove"),
]


@pytest.mark.parametrize(("name", "damage", "line"), DAMAGED_FILES)
def test_a_damaged_file_of_a_store_is_named_and_rewritten_without_the_manifest(own, name, damage, line):
    store = store_of(own)
    whole, path = contents(store), store / "pieces" / name
    raw = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(raw))
    with pytest.raises(DataError, match=line):
        verified(own)
    (store / "manifest.json").unlink()
    verified(own)
    assert contents(store) == whole


def more_tokens(manifest) -> None:
    manifest["splits"]["train"]["tokens"] += 1


def more_in_a_shard(manifest) -> None:
    more_tokens(manifest)
    manifest["pieces"][0]["splits"]["train"]["tokens"] += 1


MANIFESTS = [
    (more_tokens, "splits are not the sums of the shards"),
    (more_in_a_shard, "shard 0 has counts that do not fit the sizes of its files"),
    (lambda manifest: manifest["pieces"][0].update(number=1), "shard 0 is missing or has another number"),
    (lambda manifest: manifest["pieces"].clear(), "splits are not the sums of the shards"),
    (lambda manifest: manifest["pieces"][0]["files"].clear(), "shard 0 does not name its files"),
    (lambda manifest: manifest.update(dtype="<u4"), "vocab_size and dtype do not fit together"),
    (lambda manifest: manifest.update(vocab_size=401), "manifest.json names another tokenizer"),
    (lambda manifest: manifest["splits"]["train"].update(documents=None), "splits are not the sums"),
    (lambda manifest: manifest["pieces"][0]["splits"].update(train=[]), "shard 0 has impossible counts"),
    (lambda manifest: manifest.pop("fingerprint"), "fingerprint and tokenizer must be strings"),
]


@pytest.mark.parametrize(("change", "line"), MANIFESTS)
def test_a_manifest_without_a_checksum_is_read_if_its_counts_fit_together(own, change, line):
    rewritten(store_of(own), lambda manifest: None)
    verified(own)
    rewritten(store_of(own), change)
    with pytest.raises(DataError, match=line):
        verified(own)


def test_ids_beyond_the_vocabulary_name_the_shard(own):
    store = store_of(own)
    path = store / "pieces" / "00000.heldout.tokens"
    raw = path.read_bytes()[:-2] + np.array([400], "<u2").tobytes()
    path.write_bytes(raw)
    digest = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    rewritten(store, lambda m: m["pieces"][0]["files"].update({path.name: digest}), seal=True)
    with pytest.raises(DataError, match=r"00000\.heldout\.tokens has ids beyond its vocabulary of 400"):
        verified(own)


def test_a_damaged_count_of_tokens_is_counted_again(own):
    stream = TokenStore.open(store_of(own)).split("train")
    counts = stream.token_counts(400)
    path = store_of(own) / "token_counts.train.npy"
    for damage in (flip, zeros, lambda raw: raw[:40], lambda raw: b"", lambda raw: NESTED):
        path.write_bytes(damage(path.read_bytes()))
        np.testing.assert_array_equal(stream.token_counts(400), counts)


def test_a_tokenizer_that_was_trained_here_is_verified(own):
    directory = next(Path(own.data.cache_directory).glob("tokenizers/*/trained_on.json")).parent
    record, model = directory / "trained_on.json", directory / "tokenizer.model"
    text, raw = record.read_text(), model.read_bytes()
    record.write_text(json.dumps(json.loads(text)["sources"]))  # as before there was a checksum
    verified(own)
    for damaged in ("{}", "[]", "[", '{"sources": 1}'):
        record.write_text(damaged)
        with pytest.raises(DataError, match=r"trained_on\.json is damaged; remove .* to train that tokenizer again"):
            verified(own)
    record.write_text(text)
    model.write_bytes(flip(raw))
    with pytest.raises(DataError, match=r"tokenizer\.model is damaged or missing \(sha256 differs\)"):
        verified(own)


def test_large_stores_are_verified_in_the_background_and_processes_share_the_work(own):
    path = store_of(own) / "pieces" / "00000.train.tokens"  # the only one, and so in the first process's share
    path.write_bytes(flip(path.read_bytes()))
    store = preparation.prepare(own, progress=False).stores[0]
    first, second = Verification([store], large=0), Verification([store], large=0)
    assert first.pending and second.pending
    assert store.split("train").windows(np.zeros(1, np.int64), 10).shape == (1, 10)  # it can be read meanwhile
    second.start(1, 2)
    second.wait()
    first.start(0, 2)
    for look in (first.wait, first.check):
        with pytest.raises(DataError, match=r"00000\.train\.tokens is damaged"):
            look()


@pytest.mark.parametrize("at_once", [True, False])
def test_no_checkpoint_is_saved_of_a_run_on_damaged_tokens(command, flags, own, tmp_path, monkeypatch, at_once):
    if not at_once:
        monkeypatch.setitem(Verification.__init__.__kwdefaults__, "large", 0)
        saving, verify, wait = threading.Event(), StoredFile.verify, Verification.wait

        def verify_late(file):  # the background thread notices nothing before a checkpoint is to be saved
            if threading.current_thread().name == "verification":
                saving.wait(60)
            verify(file)

        monkeypatch.setattr(StoredFile, "verify", verify_late)
        monkeypatch.setattr(Verification, "wait", lambda self: (saving.set(), wait(self)))
    path = store_of(own) / "pieces" / "00000.train.tokens"
    path.write_bytes(flip(path.read_bytes()))
    code, _, errors = command(
        "train", *flags, f"--config.data.cache_directory={own.data.cache_directory}", f"--workdir={tmp_path / 'run'}"
    )
    assert code == 3 and "00000.train.tokens is damaged" in errors.splitlines()[-1], errors
    if at_once:
        assert errors.count("\n") == 1 and not (tmp_path / "run").exists()
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_evaluate_names_damaged_held_out_tokens(command, own, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(loader.to_json(own))
    for meta in (tmp_path / "run").glob("checkpoints/*/meta/metadata"):
        resigned(meta, lambda body: body.update(config=loader.to_json(own)))
    path = store_of(own) / "pieces" / "00000.heldout.tokens"
    path.write_bytes(b"\xff" * path.stat().st_size)
    code, _, errors = command("evaluate", f"--workdir={tmp_path / 'run'}")
    assert (code, errors.count("\n")) == (3, 1) and "00000.heldout.tokens is damaged" in errors, errors


# ---- Checkpoints and the other files of a run directory ----


def resigned(path: Path, change) -> None:
    """Change the body of a checkpoint's metadata, and give it the checksum that it then has."""
    values = json.loads(path.read_text())
    change(values["body"])
    text = json.dumps(values["body"], sort_keys=True).encode()
    path.write_text(json.dumps(values | {"sha256": hashlib.sha256(text).hexdigest()}))


def metadata(change):
    return lambda run: resigned(run / "checkpoints/2/meta/metadata", change)


def write(name: str, content: bytes | None):
    """A change of a run directory: a file gets other content, or goes."""

    def changed(run: Path) -> None:
        (run / name).unlink()
        if content is not None:
            (run / name).write_bytes(content)

    return changed


def directory(name: str):
    def changed(run: Path) -> None:
        (run / name).unlink()
        (run / name).mkdir()

    return changed


def other_config(body) -> None:
    config = json.loads(body["config"])
    config["seed"] = 5
    body.update(config=json.dumps(config), run="")


AWAY = r"; move .*/checkpoints/2 away to continue from an earlier one; there are 1$"
RUNS = [
    (
        lambda run: (run / "checkpoints/2").rename(run / "checkpoints/12"),
        4,
        "was saved as step 2, not 12; rename it to",
    ),
    (
        metadata(lambda body: body.update(run="0" * 32)),
        4,
        r"is a checkpoint of another run \(00000000, not .*init_from",
    ),
    (metadata(other_config), 4, "does not belong to the run in .* seed: 5 -> 0; move it away"),
    (metadata(lambda body: body.update(tokenizer_hash="0")), 3, "tokenizer.model is not the tokenizer of checkpoint 2"),
    (metadata(lambda body: body.update(config="{}")), 4, "its config does not fit: .*" + AWAY),
    (write("checkpoints/run_id", b""), 4, "run_id is damaged: it must contain 32 hexadecimal digits; remove it"),
    (directory("checkpoints/run_id"), 4, "run_id can't be read: "),
    (write("config.json", b""), 4, "config.json can't be read: "),
    (write("config.json", b"\xff\xfe"), 4, "config.json can't be read: "),
    (write("tokenizer.model", b"garbage"), 3, "tokenizer.model"),
    (write("tokenizer.model", b""), 3, "tokenizer.model"),
    (directory("tokenizer.model"), 3, "tokenizer.model"),
]


DAMAGED = [
    *(
        (metadata(change), f"its checksum matches, but its field '{name}' is missing or not valid" + AWAY)
        for name, change in {
            "step": lambda body: body.pop("step"),
            "run": lambda body: body.update(run="\x1b[31m\n"),
            "config": lambda body: body.update(config=None),
            "tokenizer": lambda body: body.update(tokenizer="a"),
            "versions": lambda body: body.update(versions=[]),
            "leaves": lambda body: body["leaves"].update(step={"shape": [], "dtype": "int32"}),
        }.items()
    ),
    *(
        (write(f"checkpoints/2/{name}", None), f"checkpoints/2 is incomplete: it has no file {name}" + AWAY)
        for name in ("_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt", "meta/metadata")
    ),
    (directory("checkpoints/2/meta/metadata"), "it has no file meta/metadata" + AWAY),
    (write("checkpoints/2/meta/metadata", b"null"), "it is not the metadata of a t5like checkpoint" + AWAY),
    (write("checkpoints/2/meta/metadata", NESTED), "metadata can't be read: .*" + AWAY),
    (write("checkpoints/2/meta/metadata", b"\xff"), "metadata can't be read: .*" + AWAY),
]


@pytest.mark.parametrize("number", range(len(RUNS)))
def test_a_run_directory_that_was_tampered_with_is_refused(command, trained, flags, tmp_path, number):
    change, code, line = RUNS[number]
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    change(run)
    before = contents(run)
    resume = ("train", *flags, "--config.train.num_steps=3", "--config.train.checkpoint_every=1")
    for arguments in (resume, ("generate", "--prompt=ba", "--max_new_tokens=2")):
        got, _, errors = command(*arguments, f"--workdir={run}")
        assert (got, errors.count("\n")) == (code, 1), errors
        assert errors.startswith("t5like: ") and re.search(line, errors.strip()), errors
        assert contents(run) == before


@pytest.mark.parametrize("number", range(len(DAMAGED)))
def test_a_damaged_checkpoint_is_refused_by_its_step_and_otherwise_passed_over(command, trained, tmp_path, number):
    change, line = DAMAGED[number]
    run = shutil.copytree(trained, tmp_path / "run")
    change(run)
    before = contents(run)
    arguments = ("generate", "--prompt=ba", "--max_new_tokens=2", f"--workdir={run}")
    code, _, errors = command(*arguments, "--step=2")
    assert (code, errors.count("\n")) == (4, 1), errors
    assert errors.startswith("t5like: ") and re.search(line, errors.strip()), errors
    code, out, errors = command(*arguments)
    assert (code, errors.count("\n")) == (0, 1) and out, errors
    assert errors.startswith("t5like: WARNING: ") and "; the checkpoint of step 1 is used instead" in errors
    assert contents(run) == before


def test_names_that_are_not_steps_are_not_checkpoints(trained, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(trained / "checkpoints", directory)
    for name in ("007", "\u0663", "\u00b2", "9" * 30, "-3", "1e3"):
        shutil.copytree(directory / "2", directory / name)
    (directory / "45").write_text("")
    assert Checkpoints(directory, keep=1).steps() == [1, 2]


def test_a_run_without_an_id_takes_its_newest_checkpoints_or_gets_one(trained, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(trained / "checkpoints", directory)
    known = (directory / "run_id").read_text()
    (directory / "run_id").unlink()  # as when only the checkpoints' folders were copied
    checkpoints = Checkpoints(directory, keep=9)
    assert checkpoints.meta().run == known.strip() and not (directory / "run_id").exists()  # reading changes nothing
    state = TrainState(jnp.int32(3), {"kernel": jnp.ones((2, 2))}, None)
    rest = {"config": Config(), "tokenizer": b"", "tokenizer_hash": ""}
    checkpoints.save(state, **rest)
    checkpoints.close()
    assert (directory / "run_id").read_text() == known and checkpoints.meta(3).run == known.strip()
    for step in (1, 2, 3):  # as they were written before runs had ids
        resigned(directory / str(step) / "meta" / "metadata", lambda body: body.pop("run"))
    (directory / "run_id").unlink()
    checkpoints.save(state._replace(step=jnp.int32(4)), **rest)
    checkpoints.close()
    new = (directory / "run_id").read_text()
    assert new != known and [checkpoints.meta(step).run for step in (1, 4)] == ["", new.strip()]


def test_orphans_of_a_failed_read_are_not_reported(trained, capsys):
    Checkpoints(trained / "checkpoints", keep=1)

    async def orphan() -> None:
        pass

    orphan.__code__ = orphan.__code__.replace(co_filename="/lib/orbax/checkpoint/x.py")
    coroutine = orphan()
    event = {"exc_type": ValueError, "exc_traceback": None, "err_msg": None}
    sys.unraisablehook(SimpleNamespace(**event, exc_value=ValueError("late"), object=coroutine))
    assert capsys.readouterr().err == ""
    coroutine.close()
