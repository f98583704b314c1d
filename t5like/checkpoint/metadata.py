"""A checkpoint's metadata: everything but its arrays, as JSON with a checksum, checked by a schema when it is read.

    {"format": 1, "sha256": of the body, "body": {"step", "run", "config", "tokenizer", "tokenizer_hash", "versions",
                                                  "leaves": {name: {"shape", "dtype", "digest"}}}}

A checkpoint without "run" was written before runs had an id. Format 2 has a "history" in addition. Only a run that
needs one writes it: a version that does not know it would continue with other batches. Called by `checkpoints`.
"""

import base64
import binascii
import functools
import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import t5like
from t5like.checkpoint.digests import Leaf
from t5like.config.loader import from_json, to_json
from t5like.config.schema import Config
from t5like.data.row_schedule import RowSchedule, Segment, is_valid
from t5like.errors import CheckpointError, ConfigError, DamagedCheckpoint

FORMAT = 2  # of a checkpoint; a later version reads older numbers and refuses newer ones
RUN = re.compile("[0-9a-f]{32}")  # the id of a run
TEXTS = ("config", "tokenizer", "tokenizer_hash")  # fields of the body that are strings
TABLES = (
    "data",
    "base",
)  # fields of the history that are strings by name, and fields of the body where they are not empty


class History(NamedTuple):
    """What happened in a run and decides how it continues, besides its config and the state.

    Attributes:
        rows: the first row of each step.
        rewinds: how often the run has gone back to a checkpoint.
        bad_steps: number of bad steps in a row up to this one.
        data: what identifies the data of each source (`data.store.fingerprints`); empty if unknown.
        base: what identifies the weights of a LoRA run that it does not train (`base_weights.record`); else empty.
    """

    rows: RowSchedule
    rewinds: int = 0
    bad_steps: int = 0
    data: Mapping[str, str] = {}
    base: Mapping[str, str] = {}


class Meta(NamedTuple):
    """Everything in a checkpoint but its arrays.

    Attributes:
        run: the id of the run that saved it; "" if that run had none.
        history: that of a run without rewinds, if the file has none.
    """

    step: int
    run: str
    config: Config
    tokenizer: bytes
    tokenizer_hash: str
    versions: dict[str, str]
    leaves: dict[str, Leaf]
    history: History

    @property
    def has_average(self) -> bool:
        """Whether there is a moving average of the parameters."""
        return any(name.startswith("ema/") for name in self.leaves)

    def weights(self) -> dict[str, Leaf]:
        """What another run reads: the moving average if there is one, else the parameters; ``params/NAME``."""
        prefix = "ema/" if self.has_average else "params/"
        return {name: leaf for name, leaf in self.leaves.items() if name.startswith(prefix)}


def to_dict(meta: Meta) -> dict[str, Any]:
    """Return the metadata in the form of the file, with its checksum."""
    body = {
        "step": meta.step,
        "run": meta.run,
        "config": to_json(meta.config),
        "tokenizer": base64.b64encode(meta.tokenizer).decode(),
        "tokenizer_hash": meta.tokenizer_hash,
        "versions": meta.versions,
        "leaves": {name: leaf._asdict() for name, leaf in meta.leaves.items()},
    }
    body |= {name: dict(texts) for name in TABLES if (texts := getattr(meta.history, name))}
    if needed := meta.history._replace(**dict.fromkeys(TABLES, {})) != first_history(meta.config):
        rows = [list(segment) for segment in meta.history.rows.segments]
        body["history"] = {"rows": rows, "rewinds": meta.history.rewinds, "bad_steps": meta.history.bad_steps}
    return {"format": FORMAT if needed else 1, "sha256": _sha256(body), "body": body}


def first_history(config: Config) -> History:
    """The history of a run that starts."""
    return History(RowSchedule.of(config.data.batch_size))


def from_dict(values: Any) -> Meta:
    """Check and convert the result of `to_dict`.

    Raises:
        DamagedCheckpoint: the checksum does not match, or a field of the body is missing or wrong.
        CheckpointError: the format is newer, or the config is that of another version. Both messages contain the
            reason, without the file.
    """
    if not isinstance(values, dict) or type(values.get("format")) is not int:
        raise DamagedCheckpoint("it is not the metadata of a t5like checkpoint")
    if values["format"] > FORMAT:
        raise CheckpointError(
            f"format={values['format']} is newer than {FORMAT}, which t5like {t5like.__version__} reads; "
            "install a newer t5like"
        )
    body = values.get("body")
    if _sha256(body) != values.get("sha256"):
        raise DamagedCheckpoint("its checksum does not match")
    if wrong := _wrong_field(body):
        raise DamagedCheckpoint(f"its checksum matches, but its field {wrong!r} is missing or not valid")
    try:
        config = from_json(body["config"])
    except ConfigError as error:
        raise CheckpointError(f"its config does not fit: {error}") from None
    return Meta(
        body["step"],
        body.get("run", ""),
        config,
        base64.b64decode(body["tokenizer"]),
        body["tokenizer_hash"],
        body["versions"],
        {
            name: Leaf(tuple(leaf["shape"]), leaf["dtype"], tuple(leaf["digest"]))
            for name, leaf in body["leaves"].items()
        },
        _history(body, config),
    )


def _history(body: Mapping[str, Any], config: Config) -> History:
    history = first_history(config)
    if values := body.get("history"):
        rows = RowSchedule(tuple(Segment(*each) for each in values["rows"]))
        history = History(rows, values["rewinds"], values["bad_steps"])
    return history._replace(**{name: body.get(name, {}) for name in TABLES})


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of the packages that write a checkpoint, by name."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "t5like": t5like.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def _sha256(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _wrong_field(body: Any) -> str:
    """Return the first field of a body that `to_dict` can't have written, or ""."""
    if not isinstance(body, dict):
        return "body"
    leaves = body.get("leaves")
    fields = {
        "step": type(body.get("step")) is int and body["step"] >= 0,
        "run": body.get("run", "") == "" or (isinstance(body["run"], str) and RUN.fullmatch(body["run"])),
        **{name: isinstance(body.get(name), str) for name in TEXTS},
        "versions": isinstance(body.get("versions"), dict),
        "leaves": isinstance(leaves, dict) and all(map(_is_leaf, leaves.values())),
        "history": "history" not in body or _is_history(body["history"]),
        **{name: _is_table(body.get(name, {})) for name in TABLES},
    }
    if fields["tokenizer"]:
        try:
            base64.b64decode(body["tokenizer"])
        except (binascii.Error, ValueError):
            fields["tokenizer"] = False
    return next((name for name, valid in fields.items() if not valid), "")


def _is_table(table: Any) -> bool:
    return isinstance(table, dict) and all(isinstance(text, str) for text in table.values())


def _is_history(history: Any) -> bool:
    return (
        isinstance(history, Mapping)
        and is_valid(history.get("rows"))
        and all(type(number := history.get(name)) is int and number >= 0 for name in ("rewinds", "bad_steps"))
    )


def _is_leaf(leaf: Any) -> bool:
    if not isinstance(leaf, Mapping):
        return False
    shape, digest = leaf.get("shape"), leaf.get("digest")
    return (
        isinstance(leaf.get("dtype"), str)
        and all(isinstance(part, list) and all(type(number) is int for number in part) for part in (shape, digest))
        and len(digest) == 2
    )
