"""Data that can't be read: the error is one line that names the file and the fix, and nothing is prepared."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import re
import socket
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from t5like.cli import prompts
from t5like.config import loader
from t5like.config.schema import DataConfig, TokenizerConfig
from t5like.data.sources import files
from t5like.data.sources.source import RECORD_FILES, open_source
from t5like.data.store import preparation
from t5like.data.tokenizers.tokenizer import Tokenizer, train_tokenizer
from t5like.errors import DataError
from t5like.metrics.progress import status

TEXTS = [f"{number} alpha beta gamma" for number in range(60)]
LINES = "".join(f'{{"text": "{text}"}}\n' for text in TEXTS)
KINDS = ("text", *RECORD_FILES)


def refused(spec, **fields):
    """Read a source from end to end: the one line that it is refused with."""
    with pytest.raises(DataError) as refusal:
        opened = open_source(str(spec), DataConfig(**fields))
        for number in range(len(opened)):
            opened[number]
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def compressed_tar():
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as archive:
        entry = tarfile.TarInfo("a.jsonl")
        entry.size = len(LINES)
        archive.addfile(entry, io.BytesIO(LINES.encode()))
    return raw.getvalue()


def zipped():
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        archive.writestr("a.jsonl", LINES)
    return raw.getvalue()


# ---- Formats ----


FORMATS = {
    "xz": (lzma.compress(LINES.encode()), "is compressed by xz, not text in UTF-8; unpack it with xz -dk FILE"),
    "bzip2": (bz2.compress(LINES.encode()), "is compressed by bzip2, .* bzip2 -dk FILE"),
    "zip": (zipped(), "is a zip archive"),
    "gzip in gzip": (gzip.compress(gzip.compress(LINES.encode())), "gzip"),
    "tar in gzip": (compressed_tar(), "a tar archive|gzip"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3\n", "is a PDF file, not text in UTF-8; convert it with pdftotext FILE"),
    "SQLite": (b"SQLite format 3\0" + bytes(84), "is an SQLite database"),
    "UTF-16 with a mark": (LINES.encode("utf-16"), "is UTF-16, .* iconv -f UTF-16 -t UTF-8 FILE > NEW"),
    "UTF-32 with a mark": (LINES.encode("utf-32"), "is UTF-32, .* iconv -f UTF-32 -t UTF-8 FILE > NEW"),
    "UTF-16LE": (LINES.encode("utf-16-le"), "bytes are NUL; it looks like UTF-16; .* iconv -f UTF-16LE"),
    "UTF-16BE": (LINES.encode("utf-16-be"), "bytes are NUL; it looks like UTF-16; .* iconv -f UTF-16BE"),
    "UTF-32LE": (LINES.encode("utf-32-le"), "bytes are NUL; it looks like UTF-32; .* iconv -f UTF-32LE"),
    "UTF-16LE, Cyrillic": (LINES.replace("alpha", "привет").encode("utf-16-le"), "looks like UTF-16; .* UTF-16LE"),
    "zeroes": (bytes(100_000), "are NUL; the file has a hole"),
    "a hole": (LINES.encode() * 20 + bytes(70_000) + b"\n", "are NUL; the file has a hole"),
    "NULs at odd places": (b"hello\0world " * 2000, r"are NUL; .* as in tr -d '\\000' < FILE > NEW"),
    "NULs at all places": ("один\0и два ".encode() * 2000 + b"a\0" * 9, r"as in tr -d .\\000. < FILE > NEW"),
    "Latin-1": (LINES.encode() + b'{"text": "caf\xe9"}\n', "invalid UTF-8 at byte .* iconv -f WINDOWS-1252"),
    "continuation bytes": (b"\x80" * 100_000, "invalid UTF-8 at byte 0|only blank lines"),
}


@pytest.mark.parametrize(("raw", "message"), FORMATS.values(), ids=FORMATS)
def test_another_format_than_text_is_named(tmp_path, raw, message):
    path = tmp_path / "a"
    path.write_bytes(raw)
    begins_well = raw.startswith(LINES.encode())
    for kind in ("text", "jsonl") if begins_well else ("text", "jsonl", "tsv", "csv"):
        for documents in ("file", "line", "passage") if kind == "text" else ("auto",):
            line = refused(f"{kind}:{path}", text_documents=documents)
            assert re.search(message, line) and str(path) in line, (kind, documents)


def test_compressed_and_columnar_files_are_not_text_files(tmp_path):
    path = tmp_path / "a"
    for raw, name in ((gzip.compress(LINES.encode()), "gzip"), (zstandard.compress(LINES.encode()), "Zstandard")):
        path.write_bytes(raw)
        assert f"a is compressed by {name}, not text in UTF-8; unpack it, or use" in refused(f"text:{path}")
    pq.write_table(pa.table({"text": TEXTS}), path)
    assert "a is a Parquet file, not text in UTF-8; use data.source=parquet:GLOB" in refused(f"jsonl:{path}")


def test_lines_that_end_with_cr_alone_are_refused(tmp_path):
    (tmp_path / "a").write_bytes(LINES.replace("\n", "\r").encode())
    for kind in ("text", "jsonl", "tsv", "csv"):
        assert "a: its lines end with CR alone; convert" in refused(f"{kind}:{tmp_path}/a", text_documents="line")


def test_a_few_nul_bytes_are_text(tmp_path):
    (tmp_path / "a").write_bytes(b"a\0b\n" + b"word " * 40 + b"\0\0\0\n")
    opened = open_source(f"text:{tmp_path}/a", DataConfig(text_documents="line"))
    assert [opened[0], opened[1]] == ["a\0b", "word " * 40 + "\0\0\0"]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_bad_byte_is_reported_at_its_offset_in_the_file(tmp_path, mark):
    raw = bytearray(mark + b"a line of text\n" * 6000)
    for offset in (70_000, 20):
        raw[offset] = 0xFF
        (tmp_path / "a").write_bytes(raw)
        for documents in ("file", "passage"):
            assert f"a: invalid UTF-8 at byte {offset} of the file" in refused(
                f"text:{tmp_path}/a", text_documents=documents
            )


# ---- Files that never end, or can't be read twice ----


def test_sources_prompts_and_tokenizers_are_regular_files(tmp_path):
    reading_end, _ = pipe = os.pipe()
    os.mkfifo(tmp_path / "fifo")
    os.symlink("loop", tmp_path / "loop")
    os.symlink("nowhere", tmp_path / "broken")
    (tmp_path / "directory").mkdir()
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as bound:
        bound.bind(str(tmp_path / "socket"))
        for path, message in {
            tmp_path
            / "fifo": "is a pipe, such as <(command) makes, and can be read only once; write the data to a file",
            f"/dev/fd/{reading_end}": "is a pipe, such as <(command) makes, and can be read only once",
            "/dev/zero": "is a device, not a regular file; write the data to a file first",
            tmp_path / "socket": "is a socket; write the data to a file first",
            tmp_path / "loop": "can't be read: Too many levels of symbolic links",
            tmp_path / "broken": "can't be read: No such file",
            tmp_path / "directory": "is a directory; name ",
        }.items():
            for kind in KINDS:
                assert message in refused(f"{kind}:{path}")
            for read in (prompts.read_prompts, lambda path: Tokenizer.load(path, num_sentinels=10)):
                with pytest.raises(DataError) as refusal:
                    read(tmp_path / path)
                assert f"={path} {message}" in str(refusal.value)
    for end in pipe:
        os.close(end)


def test_a_tokenizer_file_is_not_read_beyond_the_size_of_tokenizers(tmp_path):
    with open(tmp_path / "large", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match="tokenizer.path=.*/large is larger than 256 MiB"):
        Tokenizer.load(tmp_path / "large", num_sentinels=10)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_small_file_that_unpacks_to_very_much_is_refused_and_text_is_not(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(files, "UNCHECKED_BYTES", 2**20)
    letters = np.random.default_rng(0).integers(97, 123, 2_000_000, np.uint8).tobytes().decode()
    honest = [letters[start : start + 1000] for start in range(0, len(letters), 1000)]
    for name, texts in (("honest", honest), ("bomb", ["a" * 1000] * 4000)):
        if kind == "parquet":
            pq.write_table(pa.table({"text": texts}), tmp_path / name)
        else:
            lines = [json.dumps({"text": text}) for text in texts] if kind == "jsonl" else ["text", *texts]
            (tmp_path / name).write_bytes(zstandard.compress("\n".join(lines).encode()))
    opened = open_source(f"{kind}:{tmp_path}/honest", DataConfig())
    assert [opened[number] for number in range(len(opened))] == honest
    assert re.search(r"bomb unpacks to more than 200 times its size \(\d", refused(f"{kind}:{tmp_path}/bomb"))


def test_blank_lines_are_skipped_and_gigabytes_of_them_refused(tmp_path):
    rng = np.random.default_rng(0)
    runs = [b"\n \n\t\n"[: rng.integers(6)] + b"\r\n" * rng.choice([0, 1, 60, 70, 5000]) for _ in range(50)]
    raw = b"".join(blank + b'{"text": "%d"}\n' % number for number, blank in enumerate(runs))
    numbers = [number for number, line in enumerate(raw.split(b"\n"), 1) if line.strip()]
    for name, content in (("plain", raw), ("packed", zstandard.compress(raw))):
        (tmp_path / name).write_bytes(content)
        opened = open_source(f"jsonl:{tmp_path}/{name}", DataConfig())
        where = [opened.record(number).where for number in range(len(opened))]
        assert where == [f"{tmp_path}/{name}:{number}" for number in numbers]
    with zstandard.ZstdCompressor().stream_writer(open(tmp_path / "bomb", "wb")) as file:
        for _ in range(66):
            file.write(b"\n" * 2**20)
    assert "more than 64 MiB of blank lines in a row; remove them" in refused(f"jsonl:{tmp_path}/bomb")


# ---- Parquet ----


COLUMNS = {
    "int": (pa.array([1]), "'text' is a int, not a text"),
    "null": (pa.nulls(1), "'text' is a NoneType, not a text"),
    "list": (pa.array([["a"]]), "'text' is a list, not a text"),
    "struct": (pa.array([{"a": "b"}]), "'text' is a dict, not a text"),
    "map": (pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string())), "'text' is a list, not a text"),
    "date": (pa.array([2**30], pa.date32()), r"'text' is of type date32\[day\], which can't be read"),
    "nanoseconds": (pa.array([1], pa.time64("ns")), r"'text' is of type time64\[ns\], which can't be read"),
    "duration": (pa.array([2**62], pa.duration("s")), r"'text' is of type duration\[s\], which can't be read"),
    "bytes": (pa.array([b"\xff"]), "row 0 of row group 0: 'text': invalid UTF-8 at byte 0 of the text"),
}


@pytest.mark.parametrize(("column", "message"), COLUMNS.values(), ids=COLUMNS)
def test_a_column_that_is_not_text_is_refused(tmp_path, column, message):
    pq.write_table(pa.table({"text": column}), tmp_path / "a")
    assert re.search(message, refused(f"parquet:{tmp_path}/a"))


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.dictionary("int32", "str")],
    ids=str,
)
def test_columns_of_every_text_type_are_read(tmp_path, kind):
    texts = ["one", "zwei é", ""] * 100
    pq.write_table(pa.table({"text": pa.array(texts).cast(kind)}), tmp_path / "a", row_group_size=170)
    opened = open_source(f"parquet:{tmp_path}/a", DataConfig())
    assert [opened[number] for number in range(len(opened))] == texts and opened[3] == "one"


def test_damaged_and_ambiguous_parquet_files_are_refused(tmp_path):
    path = tmp_path / "a"
    pq.write_table(pa.table([TEXTS, TEXTS, TEXTS], names=["text", "text", "other"]), path)
    assert refused(f"parquet:{path}") == f"{path}: 2 columns have the name 'text'; rename all but one"
    assert open_source(f"parquet:{path}", DataConfig(text_field="other"))[1] == TEXTS[1]
    pq.write_table(pa.table({"text": TEXTS[:0]}), path)
    assert "there are no rows" in refused(f"parquet:{path}")
    pq.write_table(pa.table({"text": TEXTS}), path)
    raw = path.read_bytes()
    for damaged in (raw[:1], raw[:9], raw[: len(raw) // 2], raw[:-1], raw[:4] + raw[40:], b"\0" * len(raw), b"text\n"):
        path.write_bytes(damaged)
        assert "a is not a Parquet file that can be read" in refused(f"parquet:{path}")


def test_a_row_group_that_unpacks_to_gigabytes_is_read_in_bounded_memory(tmp_path):
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 4000, pa.int32()), pa.array(["x" * 2**20]))
    pq.write_table(pa.table({"text": texts}), tmp_path / "a")
    assert (tmp_path / "a").stat().st_size < 2**17
    opened = open_source(f"parquet:{tmp_path}/a", DataConfig())
    before = pa.total_allocated_bytes()
    assert len(opened) == 4000 and len(opened[0]) == 2**20
    assert pa.total_allocated_bytes() - before < 2**29


# ---- Surrogates, prompts, training ----


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(TEXTS * 9, TokenizerConfig(vocab_size=290, num_sentinels=10), path)
    return path


@pytest.fixture
def prepare(tmp_path, model):
    """Prepare a source; the store."""
    tokenizer = {"path": str(model), "vocab_size": 290, "num_sentinels": 10}
    data = {"cache_directory": str(tmp_path / "prepared"), "num_workers": 1}

    def prepared(spec, **fields):
        config = loader.resolve({"tokenizer": tokenizer, "data": {**data, **fields, "source": [spec]}})
        return preparation.prepare(config, progress=False).stores[0]

    return prepared


def test_half_of_a_surrogate_pair_is_refused_before_work(tmp_path, prepare):
    for row in ('{"text": "a", "unused": "\\ud800"}', '{"text": "a", "\\udc00": 1}', '{"text": "\\ud800"}'):
        (tmp_path / "a").write_text(row + "\n" + LINES)
        with pytest.raises(DataError, match="a:1: not valid JSON .a string has half of a surrogate pair") as refusal:
            prepare(f"jsonl:{tmp_path}/a")
        assert "\n" not in str(refusal.value) and not list(tmp_path.glob("prepared/stores/*"))
        (tmp_path / "a").write_text(row.replace('"text"', '"prompt"') + "\n")
        with pytest.raises(DataError, match="--prompts_file=.*/a:1: not valid JSON .a string has half of a surrogate"):
            prompts.read_prompts(tmp_path / "a")


def test_prompts_are_read_as_json_lines_are(tmp_path):
    rows = [{"prompt": "é", "id": 1}, {"prompt": ""}]
    raw = b"\xef\xbb\xbf" + "\r\n\n".join(json.dumps(row) for row in rows).encode()
    for name, content in (("plain", raw), ("packed", gzip.compress(raw))):
        (tmp_path / name).write_bytes(content)
        assert prompts.read_prompts(tmp_path / name) == rows
    for content, message in (
        (json.dumps(rows[0]).encode("utf-16"), " is UTF-16, not text in UTF-8; convert it"),
        (b'{"prompt": "\xff"}', ":1: invalid UTF-8 at byte 12 of the line"),
        (b"[" * 100_000, ":1: not valid JSON"),
        (b"\n\n[1]\n", ":3: a JSON list, but every line must be one JSON object"),
    ):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(DataError) as refusal:
            prompts.read_prompts(tmp_path / "a")
        assert str(refusal.value).startswith(f"--prompts_file={tmp_path}/a{message}")


@pytest.mark.parametrize(
    "failure", [DataError("a.jsonl:7: bad"), KeyboardInterrupt(15), OSError(5, "io"), KeyError("x")]
)
def test_an_exception_of_a_source_in_tokenizer_training_is_raised_unchanged(tmp_path, failure):
    def texts():
        yield from TEXTS
        raise failure

    with pytest.raises(type(failure)) as raised:
        train_tokenizer(texts(), TokenizerConfig(vocab_size=290, num_sentinels=10), tmp_path / "tokenizer.model")
    assert raised.value is failure and not list(tmp_path.iterdir())


# ---- Files that change while they are read ----


CHANGES = {
    "grows": (
        lambda path, raw: path.write_bytes(raw + raw),
        "changed while it was read; prepare again when no program",
    ),
    "shrinks": (lambda path, raw: os.truncate(path, len(raw) // 2 + 1), "."),
    "vanishes": (lambda path, raw: path.unlink(), "/a can't be read: No such file"),
    "is edited": (lambda path, raw: path.write_bytes(raw.replace(b"alpha", b"ALPHA")), "changed while it was read"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_file_that_changes_while_it_is_read_gives_no_store(tmp_path, prepare, monkeypatch, kind, change, message):
    path = tmp_path / "a"
    if kind == "parquet":
        pq.write_table(pa.table({"text": TEXTS}), path)
    else:
        header, row = {"jsonl": ("", '{{"text": "{}"}}\n')}.get(kind, ("text\n", "{}\n"))
        path.write_text(header + "".join(row.format(text) for text in TEXTS))
    raw = path.read_bytes()
    write_shards = preparation.write_shards

    def meanwhile(*arguments):
        change(path, raw)
        yield from write_shards(*arguments)

    monkeypatch.setattr(preparation, "write_shards", meanwhile)
    with pytest.raises(DataError, match=message) as refusal:
        prepare(f"{kind}:{path}", text_documents="line")
    assert "\n" not in str(refusal.value) and str(path) in str(refusal.value)
    assert not list(tmp_path.glob("prepared/stores/*/**/*.json"))
    monkeypatch.undo()
    path.write_bytes(raw)
    store = prepare(f"{kind}:{path}", text_documents="line")
    assert store.split("train").num_documents + store.split("heldout").num_documents >= len(TEXTS)


def test_a_source_s_name_with_brackets_is_shown_unchanged():
    with status("reading jsonl:a[/b]"):
        pass
