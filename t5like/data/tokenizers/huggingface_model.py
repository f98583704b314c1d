"""Tokenizers from tokenizer.json files: BPE on bytes (GPT-2, Llama 3, Qwen), WordPiece (BERT), Unigram.

The `tokenizers` library reads and applies them. The special ids are often defined in files beside tokenizer.json, so
all files are bundled as one, RUN/tokenizer.model:

    {"t5like_tokenizer": 1, "files": {"tokenizer.json": "...", ...}, "special_ids": {"eos_token_id": 2, ...}}

``files`` maps names to their text, byte for byte, for export. ``special_ids`` are those of the model's config.json, for
special tokens that the files do not name. A tokenizer.json without bundle is accepted as well.

Ids may have gaps. An id in a gap counts in the vocabulary size, but no text has it.
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
from t5like.errors import DataError, one_line
from t5like.io.regular_files import read_regular
from t5like.io.strict_json import InvalidJSON, loads

MAIN = "tokenizer.json"
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
LARGEST_FILE = 2**28  # bytes; the largest have 40 million
MAX_TOKEN_ID = 2**24  # the largest vocabularies have a million ids
_PREFIX = '{"t5like_tokenizer":'
_UNMATCHABLE = "\U0010ffff"  # not a character: part of the names of tokens that text must never match
_USUAL_NAMES = {
    "eos": ("</s>", "<|endoftext|>", "<|end_of_text|>", "[SEP]"),
    "pad": ("<pad>", "[PAD]"),
    "unk": ("<unk>",),
}
_SAME = {"cls": "bos", "sep": "eos"}  # what masked language models without their own tokens use
_SPACE_BYTES = "\u0120\u010a\u0109\u010d"  # how GPT-2's alphabet writes space, newline, tab and carriage return


def is_json(content: bytes) -> bool:
    """Whether the content is JSON; a SentencePiece model can't begin with these bytes."""
    return re.match(rb'\s*\{\s*"', content[:64]) is not None


def bundle(path: Path, content: bytes) -> bytes:
    """Bundle a tokenizer.json with the files beside it; returns an existing bundle unchanged.

    Raises:
        DataError: a file beside it is not JSON, can't be read, or is too large.
    """
    if content.startswith(_PREFIX.encode()):
        return content
    files = {MAIN: _text(content, path)}
    for name in SIDE_FILES:
        if (side_file := path.with_name(name)).is_file():
            files[name] = _text(read_regular(side_file, str(side_file), LARGEST_FILE), side_file)
    special_ids = {}
    for name in ("generation_config.json", "config.json"):
        if (side_file := path.with_name(name)).is_file():
            config = _object(_text(read_regular(side_file, str(side_file), LARGEST_FILE), side_file), str(side_file))
            special_ids |= {f"{role}_token_id": config.get(f"{role}_token_id") for role in ROLES}
    special_ids = {name: token for name, token in sorted(special_ids.items()) if token is not None}
    rest = json.dumps({"files": files, "special_ids": special_ids}, ensure_ascii=False)
    return f"{_PREFIX} 1, {rest[1:]}".encode()


class JsonModel:
    """A tokenizer.json with sentinels; attributes and methods are those of `tokenizer.Tokenizer`.

    Sentinels are its <extra_id_N> tokens, or [MASK] and [CLS] of a tokenizer like BERT's; otherwise ids above its
    largest. `num_sentinels` None means as many as it has.
    """

    def __init__(self, content: bytes, num_sentinels: int | None, origin: str) -> None:
        try:
            self._open(content, num_sentinels, origin)
        except (AttributeError, IndexError, KeyError, TypeError) as error:  # a file from elsewhere may have any content
            raise DataError(f"{origin} is not in the format of the tokenizers library: {error!r}") from None

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
        self._encoder = self._build_tokenizer(hidden=self._special - {self.unk_id})

    def ordinary_V(self) -> np.ndarray:
        ordinary_V = np.array([name is not None for name in self._names])
        ordinary_V[self.sentinel_ids] = False
        ordinary_V[sorted(self._special)] = False
        return ordinary_V

    def bytes_V(self) -> np.ndarray:
        """See `Tokenizer`; a WordPiece that begins a word includes the space before it."""
        bytes_V = np.zeros(self.vocab_size)
        added = {token["id"] for token in self._added}
        for token in np.flatnonzero(self.ordinary_V()).tolist():
            name = self._names[token]
            if token in added:
                bytes_V[token] = len(name.encode())
            elif self._byte_level:
                bytes_V[token] = len(name)  # its alphabet has one character per byte
            elif self._subword_prefix:
                bytes_V[token] = len(name.removeprefix(self._subword_prefix).encode()) + (
                    not name.startswith(self._subword_prefix)
                )
            elif re.fullmatch("<0x[0-9A-F]{2}>", name):
                bytes_V[token] = 1
            else:
                bytes_V[token] = len(name.replace(SPACE, " ").encode())
        return bytes_V

    def begins_word_V(self) -> np.ndarray:
        begins_word_V = np.zeros(self.vocab_size, bool)
        for token in np.flatnonzero(self.ordinary_V()).tolist():
            name = self._names[token]
            if self._subword_prefix:
                begins_word_V[token] = not name.startswith(self._subword_prefix)
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
        self._encoder.encode_special_tokens = False  # the only special tokens it knows are the sentinels
        try:
            return self._encoder.encode(text, add_special_tokens=False).ids
        finally:
            self._encoder.encode_special_tokens = True

    def decode(self, token_ids: Iterable[int], keep_special: bool) -> str:
        skipped = set() if keep_special else self._skipped
        ids = [int(token) for token in token_ids if int(token) not in skipped]
        return self._decoder.decode(ids, skip_special_tokens=False)

    @cached_property
    def _decoder(self):
        return self._build_tokenizer(hidden=set())

    @cached_property
    def _byte_level(self) -> bool:
        parts = (self._json.get("pre_tokenizer"), self._json.get("decoder"))
        return any(part["type"] == "ByteLevel" for part in _parts(parts))

    @cached_property
    def _subword_prefix(self) -> str:
        """The prefix of a WordPiece inside a word (``##``); empty for other models."""
        model = self._json["model"]
        return "" if isinstance(model["vocab"], list) else model.get("continuing_subword_prefix") or ""

    def _roles(self, special_ids: dict[str, Any]) -> dict[str, int]:
        """Ids of special tokens by role, from the files beside the tokenizer, else by the usual names."""
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
        for role in ("mask", "cls", "sep"):  # BERT's files name no roles
            if role not in roles and (name := f"[{role.upper()}]") in self._vocabulary:
                roles[role] = self._vocabulary[name]
        for role, names in _USUAL_NAMES.items():
            if role not in roles and (known := [name for name in names if name in self._vocabulary]):
                roles[role] = self._vocabulary[known[0]]
        if "mask" in roles:  # EuroBERT's texts begin with BOS and end with EOS
            roles |= {role: roles[same] for role, same in _SAME.items() if role not in roles and same in roles}
        unknown = self._json["model"].get("unk_token")
        if "unk" not in roles and unknown in self._vocabulary:
            roles["unk"] = self._vocabulary[unknown]
        elif isinstance(self._json["model"].get("unk_id"), int):
            roles["unk"] = self._json["model"]["unk_id"]
        return roles

    def _set_special_ids(self, roles: dict[str, int]) -> None:
        # BERT ends a text with [SEP]. Some related tokenizers define an EOS token that no text has.
        pair = {"mask", "cls", "sep"} <= set(roles)
        if not pair and "eos" not in roles:
            raise DataError(
                f"{self._origin} has no end-of-sequence token; name it as eos_token in a tokenizer_config.json "
                "beside it"
            )
        self.eos_id = roles["sep"] if pair else roles["eos"]
        pad = roles.get("pad")
        if len(self.sentinel_ids) and pad != 0 and not pair:  # an encoder never reads the id of padding
            named = "no pad token" if pad is None else f"pad id {pad}"
            raise DataError(
                f"{self._origin} has {named}, but with sentinels that must be id 0; use another tokenizer, or "
                "tokenizer.num_sentinels=0 for a decoder with causal_lm or prefix_lm"
            )
        self.pad_id, self.unk_id, self.pads_with_a_token = 0, roles.get("unk"), pad == 0
        self._skipped = {self.eos_id} | ({pad} if pad is not None else set())
        first = next(
            (part for part in _parts(self._json.get("post_processor")) if part["type"] in _ADDING_PROCESSORS), None
        )
        self.bos_id = roles.get("bos") if first and _first_id(first) == roles.get("bos") != self.eos_id else None

    def _set_sentinels(self, roles: dict[str, int], num_sentinels: int | None, size: int) -> None:
        id_by_number = {}
        for name, token in self._vocabulary.items():
            if match := SENTINEL.fullmatch(name.removeprefix(SPACE)):
                id_by_number[int(match[1])] = token
        numbers = sorted(id_by_number)
        pair = not numbers and {"mask", "cls", "sep"} <= set(roles)
        sentinels = [roles["mask"], roles["cls"]] if pair else [id_by_number[number] for number in numbers]
        num_sentinels = len(sentinels) if num_sentinels is None else num_sentinels
        if sentinels and (len(sentinels) != num_sentinels or numbers != list(range(len(numbers)))):
            what = "[MASK] and [CLS], which serve as sentinels" if pair else f"{len(sentinels)} <extra_id_N> tokens"
            raise DataError(
                f"tokenizer.num_sentinels={num_sentinels}, but {self._origin} has {what}; "
                f"use tokenizer.num_sentinels={len(sentinels)}"
            )
        self.vocab_size = size if sentinels else size + num_sentinels
        self.sentinel_ids = np.array(sentinels or range(size + num_sentinels - 1, size - 1, -1), np.int32)
        names = (
            [name for token in sentinels for name, each in self._vocabulary.items() if each == token] if pair else []
        )
        self.sentinel_names = tuple(names or (f"<extra_id_{number}>" for number in range(num_sentinels)))

    def _build_tokenizer(self, hidden: set[int]):
        """The library's tokenizer with sentinels as special tokens, in which text never becomes a hidden token.

        Hidden tokens get a name that no text contains, and sentinels get the names of this package. With U+10FFFF
        written as ?, hidden {1}, and the only sentinel 4, an id above those of the vocabulary:

            tokenizer.json    {"<pad>": 0, "</s>": 1, "a": 2, "b": 3}
            built             {"<pad>": 0, "?1?": 1, "a": 2, "b": 3}    added token 4: <extra_id_0>

        so that ``</s>`` in a text is encoded as four characters.
        """
        library = _library()
        content = self._json | {"post_processor": None, "truncation": None, "padding": None}
        sentinels = dict(zip(self.sentinel_ids.tolist(), self.sentinel_names, strict=True))
        model = content["model"]
        merged = set()  # names that result from merges; they can't be changed
        if hidden and model.get("merges"):
            merged = {"".join(each.split(" ") if isinstance(each, str) else each) for each in model["merges"]}
        unmatchable = {
            token: f"{_UNMATCHABLE}{token}{_UNMATCHABLE}" for token in hidden if self._names[token] not in merged
        }
        names = unmatchable | sentinels
        content["model"] = model | {"vocab": _renamed(model["vocab"], names)}
        content["added_tokens"] = self._added_tokens(names, sentinels)
        try:
            tokenizer = library.Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the library has no exception type for it
            raise DataError(
                f"{self._origin} can't be read by tokenizers {library.__version__}: {one_line(error)}"
            ) from None
        for entry in content["added_tokens"]:
            if (token := tokenizer.token_to_id(entry["content"])) != entry["id"]:
                raise DataError(
                    f"{self._origin}: the added token {self._names[entry['id']]!r} has id {entry['id']}, but "
                    f"tokenizers {library.__version__} gives it {token}; ids of added tokens must go on without gaps"
                )
        tokenizer.encode_special_tokens = True
        return tokenizer

    def _added_tokens(self, names: dict[int, str], sentinels: dict[int, str]) -> list[dict[str, Any]]:
        """The entries of the file's added tokens and of the sentinels, with their new names."""
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        entries = {token: {"id": token, "content": name, **plain} for token, name in sentinels.items()}
        entries |= {token["id"]: token | {"content": names.get(token["id"], token["content"])} for token in self._added}
        return [
            entry | {"special": entry.get("special", False) or token in sentinels}
            for token, entry in sorted(entries.items())
        ]


_ADDING_PROCESSORS = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")


def _first_id(processor: dict[str, Any]) -> int | None:
    """The id that a post-processor prepends to a text."""
    if processor["type"] != "TemplateProcessing":
        return processor["cls"][1]
    first = processor["single"][0].get("SpecialToken")
    return processor["special_tokens"][first["id"]]["ids"][0] if first else None


def ids(content: dict[str, Any]) -> set[int]:
    """All ids of a tokenizer.json."""
    return set(_tokens(content, MAIN)[0].values())


def _library():
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # encoding is parallel over processes
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
        raise DataError(f"{origin} is not JSON: it has bytes that are not UTF-8") from None


def _object(text: str, origin: str) -> dict[str, Any]:
    try:
        value = loads(text)
    except InvalidJSON as error:
        raise DataError(f"{origin} is not JSON, or is truncated: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{origin} must be a JSON object")
    return value


def _tokens(content: dict[str, Any], origin: str) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Ids of all tokens by name, and the entries of added tokens."""
    try:
        vocabulary, added = content["model"]["vocab"], content.get("added_tokens") or []
        if isinstance(vocabulary, list):
            vocabulary = {name: token for token, (name, _) in enumerate(vocabulary)}
        added = [{**token, "id": int(token["id"]), "content": str(token["content"])} for token in added]
        id_by_name = {**vocabulary, **{token["content"]: token["id"] for token in added}}
        if not all(type(token) is int and 0 <= token < MAX_TOKEN_ID for token in id_by_name.values()):
            raise DataError(f"{origin} has token ids that are not whole numbers from 0 to {MAX_TOKEN_ID - 1:,}")
        return id_by_name, added
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{origin} is not a tokenizer.json: it has no model with a vocab; see `tokenizers`") from None


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
    """A pre-tokenizer, post-processor or decoder and all that it is merged of."""
    if isinstance(part, list | tuple):
        for each in part:
            yield from _parts(each)
    elif isinstance(part, dict) and "type" in part:
        yield part
        for each in part.values():
            yield from _parts(each)
