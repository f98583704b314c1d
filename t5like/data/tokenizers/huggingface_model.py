"""tokenizer.json files, as `Tokenizer` uses them: BPE on bytes (GPT-2, Llama 3, Qwen), WordPiece (BERT), Unigram.

The `tokenizers` library reads and applies them. Which ids are special often stands in the files beside it, so all that
matters travels as one file, RUN/tokenizer.model:

    {"t5like_tokenizer": 1, "files": {"tokenizer.json": "...", ...}, "special_ids": {"eos_token_id": 2, ...}}

files: name to text, byte for byte what was read, for export; special_ids: from the model's config.json, where the
files name no such token. A bare tokenizer.json is read, too.

Ids may have gaps: they count as ids, but no text has them.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from t5like.data.tokenizers.sentencepiece_model import SENTINEL, SPACE
from t5like.errors import DataError
from t5like.io.regular_files import read_regular
from t5like.io.strict_json import InvalidJSON, loads

MAIN = "tokenizer.json"
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
LARGEST_FILE = 2**28  # bytes; the largest have 40 million
LARGEST = 2**24  # ids; the largest vocabularies have a million
_PREFIX = '{"t5like_tokenizer":'
_NEVER = "\U0010ffff"  # no character: begins the names of tokens that no text may become
_USUAL = {"eos": ("</s>", "<|endoftext|>", "<|end_of_text|>", "[SEP]"), "pad": ("<pad>", "[PAD]"), "unk": ("<unk>",)}
_SPACE_BYTES = "\u0120\u010a\u0109\u010d"  # how GPT-2's alphabet writes space, newline, tab and carriage return


def is_json(content: bytes) -> bool:
    """Whether this is JSON, not a SentencePiece model, which can't begin like that."""
    return re.match(rb'\s*\{\s*"', content[:64]) is not None


def bundle(path: Path, content: bytes) -> bytes:
    """A tokenizer.json and the files beside it as one file; what is one already stays as it is.

    Raises:
        DataError: a file beside it is no JSON, can't be read, or is too large.
    """
    if content.startswith(_PREFIX.encode()):
        return content
    files = {MAIN: _text(content, path)}
    for name in BESIDE:
        if (beside := path.with_name(name)).is_file():
            files[name] = _text(read_regular(beside, str(beside), LARGEST_FILE), beside)
    special_ids = {}
    for name in ("generation_config.json", "config.json"):
        if (beside := path.with_name(name)).is_file():
            config = _object(_text(read_regular(beside, str(beside), LARGEST_FILE), beside), str(beside))
            special_ids |= {f"{role}_token_id": config.get(f"{role}_token_id") for role in ROLES}
    special_ids = {name: token for name, token in sorted(special_ids.items()) if token is not None}
    rest = json.dumps({"files": files, "special_ids": special_ids}, ensure_ascii=False)
    return f"{_PREFIX} 1, {rest[1:]}".encode()


class JsonModel:
    """A tokenizer.json with sentinels; attributes and methods as in `tokenizer.Tokenizer`.

    Sentinels are its <extra_id_N> tokens; of a tokenizer like BERT's, [MASK] and [CLS]; else they lie above its ids.
    With `num_sentinels` None there are as many as it has.
    """

    def __init__(self, content: bytes, num_sentinels: int | None, origin: str) -> None:
        try:
            self._open(content, num_sentinels, origin)
        except (AttributeError, IndexError, KeyError, TypeError) as error:  # a file from elsewhere may say anything
            raise DataError(f"{origin} is not as the tokenizers library writes it: {error!r}") from None

    def _open(self, content: bytes, num_sentinels: int | None, origin: str) -> None:
        self.files, special_ids = _unbundled(content, origin)
        self._json = _object(self.files[MAIN], origin)
        self._origin = origin
        self._vocabulary, self._added = _tokens(self._json, origin)
        size = max(self._vocabulary.values(), default=-1) + 1
        roles = self._roles(special_ids)
        self._set_sentinels(roles, num_sentinels, size)
        self._set_special_ids(roles)
        self._names: list[str | None] = [None] * self.vocab_size
        for name, token in self._vocabulary.items():
            self._names[token] = name
        for name, token in zip(self.sentinel_names, self.sentinel_ids.tolist(), strict=True):
            self._names[token] = name
        special = {*roles.values(), *(token["id"] for token in self._added if token.get("special"))}
        self._special = special - set(self.sentinel_ids.tolist())
        self._encoder = self._ready(hidden=self._special - {self.unk_id})

    def ordinary_V(self) -> np.ndarray:
        ordinary_V = np.array([name is not None for name in self._names])
        ordinary_V[self.sentinel_ids] = False
        ordinary_V[sorted(self._special)] = False
        return ordinary_V

    def bytes_V(self) -> np.ndarray:
        """As in `Tokenizer`; a WordPiece that begins a word counts the space in front of it."""
        bytes_V = np.zeros(self.vocab_size)
        added = {token["id"] for token in self._added}
        for token in np.flatnonzero(self.ordinary_V()).tolist():
            name = self._names[token]
            if token in added:
                bytes_V[token] = len(name.encode())
            elif self._byte_level:
                bytes_V[token] = len(name)  # its alphabet has a character per byte
            elif self._inner:
                bytes_V[token] = len(name.removeprefix(self._inner).encode()) + (not name.startswith(self._inner))
            elif re.fullmatch("<0x[0-9A-F]{2}>", name):
                bytes_V[token] = 1
            else:
                bytes_V[token] = len(name.replace(SPACE, " ").encode())
        return bytes_V

    def begins_word_V(self) -> np.ndarray:
        begins_word_V = np.zeros(self.vocab_size, bool)
        for token in np.flatnonzero(self.ordinary_V()).tolist():
            name = self._names[token]
            if self._inner:
                begins_word_V[token] = not name.startswith(self._inner)
            else:
                space = name[:1] in (SPACE, " ") or (self._byte_level and name[:1] == _SPACE_BYTES[0])
                begins_word_V[token] = space or not name.strip(_SPACE_BYTES if self._byte_level else None)
        return begins_word_V

    def name(self, token: int) -> str:
        return self._names[token] or ""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(each.ids, np.int32) for each in encoded]

    def encode_with_sentinels(self, text: str) -> list[int]:
        text = SENTINEL.sub(lambda match: self.sentinel_names[int(match[1])], text)
        self._encoder.encode_special_tokens = False  # of which it knows the sentinels alone
        try:
            return self._encoder.encode(text, add_special_tokens=False).ids
        finally:
            self._encoder.encode_special_tokens = True

    def decode(self, token_ids: Iterable[int], keep_special: bool) -> str:
        left_out = set() if keep_special else self._left_out
        ids = [int(token) for token in token_ids if int(token) not in left_out]
        return self._decoder.decode(ids, skip_special_tokens=False)

    @cached_property
    def _decoder(self):
        return self._ready(hidden=set())

    @cached_property
    def _byte_level(self) -> bool:
        parts = (self._json.get("pre_tokenizer"), self._json.get("decoder"))
        return any(part["type"] == "ByteLevel" for part in _parts(parts))

    @cached_property
    def _inner(self) -> str:
        """What marks a WordPiece inside a word; empty for other models."""
        model = self._json["model"]
        return "" if isinstance(model["vocab"], list) else model.get("continuing_subword_prefix") or ""

    def _roles(self, special_ids: dict[str, Any]) -> dict[str, int]:
        """Ids of special tokens by role, as the files beside the tokenizer name them, or its own usual names."""
        named = {}
        for file in ("special_tokens_map.json", "tokenizer_config.json"):
            if file in self.files:
                named |= dict(_named(_object(self.files[file], f"{self._origin}: {file}")))
        roles = {role: self._vocabulary[name] for role, name in named.items() if name in self._vocabulary}
        for role in ROLES:
            token = special_ids.get(f"{role}_token_id")
            token = token[0] if isinstance(token, list) and token else token
            if role not in roles and isinstance(token, int) and token in self._vocabulary.values():
                roles[role] = token
        for role in ("mask", "cls", "sep"):  # BERT's files say no more than that
            if role not in roles and (name := f"[{role.upper()}]") in self._vocabulary:
                roles[role] = self._vocabulary[name]
        for role, names in _USUAL.items():
            if role not in roles and (found := [name for name in names if name in self._vocabulary]):
                roles[role] = self._vocabulary[found[0]]
        unknown = self._json["model"].get("unk_token")
        if "unk" not in roles and unknown in self._vocabulary:
            roles["unk"] = self._vocabulary[unknown]
        elif isinstance(self._json["model"].get("unk_id"), int):
            roles["unk"] = self._json["model"]["unk_id"]
        return roles

    def _set_special_ids(self, roles: dict[str, int]) -> None:
        # BERT ends a text in [SEP]. Some of its relatives name an end that no text has.
        pair = {"mask", "cls", "sep"} <= set(roles)
        if not pair and "eos" not in roles:
            raise DataError(
                f"{self._origin} has no end-of-sequence token; name it as eos_token in a tokenizer_config.json "
                "beside it"
            )
        self.eos_id = roles["sep"] if pair else roles["eos"]
        pad = roles.get("pad")
        if len(self.sentinel_ids) and pad != 0:
            named = "no pad token" if pad is None else f"pad id {pad}"
            raise DataError(
                f"{self._origin} has {named}, but with sentinels that must be id 0; use another tokenizer, or "
                "tokenizer.num_sentinels=0 for a decoder that learns causal_lm or prefix_lm"
            )
        self.pad_id, self.unk_id, self.pads_with_a_token = 0, roles.get("unk"), pad == 0
        self._left_out = {self.eos_id} | ({pad} if pad is not None else set())
        first = next((part for part in _parts(self._json.get("post_processor")) if part["type"] in _ADDS), None)
        self.bos_id = roles.get("bos") if first and _first_id(first) == roles.get("bos") != self.eos_id else None

    def _set_sentinels(self, roles: dict[str, int], num_sentinels: int | None, size: int) -> None:
        inside = {}
        for name, token in self._vocabulary.items():
            if match := SENTINEL.fullmatch(name.removeprefix(SPACE)):
                inside[int(match[1])] = token
        pair = not inside and {"mask", "cls", "sep"} <= set(roles)
        found = [inside[number] for number in sorted(inside)] or ([roles["mask"], roles["cls"]] if pair else [])
        num_sentinels = len(found) if num_sentinels is None else num_sentinels
        if found and (len(found) != num_sentinels or sorted(inside) not in ([], list(range(len(inside))))):
            what = "[MASK] and [CLS], which serve as sentinels" if pair else f"{len(found)} <extra_id_N> tokens"
            raise DataError(
                f"tokenizer.num_sentinels={num_sentinels}, but {self._origin} has {what}; "
                f"use tokenizer.num_sentinels={len(found)}"
            )
        self.vocab_size = size if found else size + num_sentinels
        self.sentinel_ids = np.array(found or range(size + num_sentinels - 1, size - 1, -1), np.int32)
        own = [name for token in found for name, each in self._vocabulary.items() if each == token] if pair else []
        self.sentinel_names = tuple(own or (f"<extra_id_{number}>" for number in range(num_sentinels)))

    def _ready(self, hidden: set[int]):
        """The library's tokenizer with our sentinels. Hidden tokens get names that no text has."""
        library = _library()
        content = self._json | {"post_processor": None, "truncation": None, "padding": None}
        sentinels = dict(zip(self.sentinel_ids.tolist(), self.sentinel_names, strict=True))
        model = content["model"]
        made = set()  # by merging, and therefore no name that can be changed
        if hidden and model.get("merges"):
            made = {"".join(each.split(" ") if isinstance(each, str) else each) for each in model["merges"]}
        names = {token: f"{_NEVER}{token}{_NEVER}" for token in hidden if self._names[token] not in made} | sentinels
        content["model"] = model | {"vocab": _renamed(model["vocab"], names)}
        added = {token["id"]: token | {"content": names.get(token["id"], token["content"])} for token in self._added}
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        added = {token: {"id": token, "content": name, **plain} for token, name in sentinels.items()} | added
        content["added_tokens"] = [
            entry | {"special": entry.get("special", False) or token in sentinels}
            for token, entry in sorted(added.items())
        ]
        try:
            tokenizer = library.Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the library has no type for it
            message = " ".join(str(error).split())
            raise DataError(
                f"{self._origin} can't be read by tokenizers {library.__version__}: {message[:300]}"
            ) from None
        for entry in content["added_tokens"]:
            if (token := tokenizer.token_to_id(entry["content"])) != entry["id"]:
                raise DataError(
                    f"{self._origin}: the added token {self._names[entry['id']]!r} has id {entry['id']}, but "
                    f"tokenizers {library.__version__} gives it {token}; ids of added tokens must go on without gaps"
                )
        tokenizer.encode_special_tokens = True
        return tokenizer


_ADDS = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")


def _first_id(processor: dict[str, Any]) -> int | None:
    """The id that a post-processor puts in front of a text."""
    if processor["type"] != "TemplateProcessing":
        return processor["cls"][1]
    first = processor["single"][0].get("SpecialToken")
    return processor["special_tokens"][first["id"]]["ids"][0] if first else None


def ids(content: dict[str, Any]) -> set[int]:
    """All ids of a tokenizer.json."""
    return set(_tokens(content, MAIN)[0].values())


def _library():
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # processes are the parallel part here
    try:
        import tokenizers
    except ImportError:
        raise DataError("a tokenizer.json needs the tokenizers library; pip install 't5like[hf]'") from None
    return tokenizers


def _unbundled(content: bytes, origin: str) -> tuple[dict[str, str], dict[str, Any]]:
    text = _text(content, origin)
    if not text.startswith(_PREFIX):
        return {MAIN: text}, {}
    value = _object(text, origin)
    if value["t5like_tokenizer"] != 1:
        raise DataError(f"{origin}: t5like_tokenizer={value['t5like_tokenizer']} is not 1, which this version reads")
    return value["files"], value["special_ids"]


def _text(content: bytes, origin: str | Path) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise DataError(f"{origin} is no JSON: it has bytes that are not UTF-8") from None


def _object(text: str, origin: str) -> dict[str, Any]:
    try:
        value = loads(text)
    except InvalidJSON as error:
        raise DataError(f"{origin} is no JSON, or is truncated: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{origin} must be a JSON object")
    return value


def _tokens(content: dict[str, Any], origin: str) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Ids by name, and the entries of added tokens."""
    try:
        vocabulary, added = content["model"]["vocab"], content.get("added_tokens") or []
        if isinstance(vocabulary, list):
            vocabulary = {name: token for token, (name, _) in enumerate(vocabulary)}
        added = [{**token, "id": int(token["id"]), "content": str(token["content"])} for token in added]
        every = {**vocabulary, **{token["content"]: token["id"] for token in added}}
        if not all(type(token) is int and 0 <= token < LARGEST for token in every.values()):
            raise DataError(f"{origin} has token ids that are not whole numbers from 0 to {LARGEST - 1:,}")
        return every, added
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{origin} is no tokenizer.json: it has no model with a vocab; see `tokenizers`") from None


def _renamed(vocabulary: list | dict[str, int], names: dict[int, str]) -> list | dict[str, int]:
    if isinstance(vocabulary, list):
        return [[names.get(token, name), score] for token, (name, score) in enumerate(vocabulary)]
    return {names.get(token, name): token for name, token in vocabulary.items()}


def _named(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Roles and names of special tokens in a tokenizer_config.json or special_tokens_map.json."""
    for role in ROLES:
        value = config.get(f"{role}_token")
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            yield role, value


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    """A pre-tokenizer, post-processor or decoder and all that it is made of."""
    if isinstance(part, list | tuple):
        for each in part:
            yield from _parts(each)
    elif isinstance(part, dict) and "type" in part:
        yield part
        for each in part.values():
            yield from _parts(each)
