"""Comma-separated values: rows compared with Python's own reader, in and out of order, and errors of bad files."""

import csv
import gzip
import io
import pickle
import random

import pytest
import zstandard

from t5like.config import loader
from t5like.config.schema import DataConfig, TokenizerConfig
from t5like.data.sources import csv_files
from t5like.data.sources.source import open_source
from t5like.data.store import preparation
from t5like.data.tokenizers.tokenizer import train_tokenizer
from t5like.errors import DataError

CELLS = [
    "plain",
    "",
    "a, b",
    'a "word"',
    '"',
    "two\nlines\n\nand a blank one",
    "\r\n",
    "é 😀 \u2028",
    " \t ",
    "x" * 200_000,
]


def source(path, **fields):
    return open_source(f"csv:{path}", DataConfig(**{"text_field": "text", **fields}))


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress], ids=["plain", "gzip", "Zstandard"])
def test_rows_are_those_of_python_in_any_order(tmp_path, compress, line_end):
    rng = random.Random(0)
    rows = [{"text": f"{i} {rng.choice(CELLS[:-1])}", "": str(i), "b c": rng.choice(CELLS[:-1])} for i in range(1100)]
    rows[7]["b c"] = CELLS[-1]
    first = io.StringIO(newline="")
    writer = csv.DictWriter(first, ["text", "", "b c"], lineterminator=line_end)
    writer.writeheader()
    writer.writerows(rows)
    (tmp_path / "a.csv").write_bytes(compress(b"\xef\xbb\xbf" + first.getvalue().encode()))
    (tmp_path / "b.csv").write_bytes(compress(b'"b c",text\n1,2\n\n\n3,"4'))  # the last row is not closed
    with pytest.raises(DataError, match=r"b.csv:5: not a row of comma-separated values \(unexpected end of data\)"):
        len(source(tmp_path / "*.csv"))
    (tmp_path / "b.csv").write_bytes(compress(b'"b c",text\n1,2\n\n\n3,"4"'))  # columns go by their names
    opened = source(tmp_path / "*.csv")
    rows += [{"b c": "1", "text": "2"}, {"b c": "3", "text": "4"}]
    assert [opened.record(number).fields for number in range(len(opened))] == rows
    copy = pickle.loads(pickle.dumps(opened))  # noqa: S301
    for number in [1101, *rng.sample(range(1102), 5)]:
        assert copy[number] == rows[number]["text"] and copy.record(number).fields == rows[number]


def test_the_location_of_a_record_is_its_first_line(tmp_path):
    (tmp_path / "a").write_text('text,n\n\n"a\nb\n\n",1\n"c",2\nd,3,4\n')
    opened = source(tmp_path / "a")
    assert [opened.record(number).where for number in range(2)] == [f"{tmp_path}/a:3", f"{tmp_path}/a:7"]
    with pytest.raises(DataError, match=r"a:8 has 3 cells, but the first line names 2 columns \(text, n\); write one"):
        opened[2]


BAD = {
    "no such column": ("a,b\n1,2\n", "a:2: there is no field 'text'; set data.text_field to one of 'a', 'b'"),
    "a name twice": (
        "text,text\n1,2\n",
        'a: the first line must name the columns, each differently, but it is ["text"',
    ),
    "no names": (",\n1,2\n", "a: the first line must name the columns"),
    "semicolons": ("n;text\n1;2\n", "a: its first line has ';' between the names of columns, where ',' must stand"),
    "tabs": ("n\ttext\n1\t2\n", r"a: its first line has '\t' between the names of columns"),
    "too few cells": ("n,text\n1\n", "a:2 has 1 cells"),
    "text behind a quote": ('n,text\n1,"a"b\n', "a:2: not a row of comma-separated values (',' expected after '\"')"),
    "an open quote": ('n,text\n1,"a\n2,b\n', "a:2: not a row of comma-separated values, up to line 3 (unexpected end"),
    "an open quote in the names": ('n,"text\n1,2\n', "a:1: not a row of comma-separated values, up to line 2"),
    "CR in a cell without quotes": ("n,text\n1,a\rb\n", "a:2: not a row of comma-separated values"),
    "names alone": ("n,text\n\n", "there are only blank lines below the first"),
    "Latin-1": (b"n,text\n1,2\n3,caf\xe9\n", "a:3: invalid UTF-8 at byte 5 of the line"),
    "an open quote in a long file": (
        'n,text\n1,"a\n' + "\n" * 10_001,
        "a:2: a row of more than 64 MiB or 10,000 lines; is a quote missing?",
    ),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_bad_files_are_refused_by_line(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(csv_files, "_LONGEST_ROW", 10_000)
    (tmp_path / "a").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as refusal:
        opened = source(tmp_path / "a")
        for number in range(len(opened)):
            opened[number]
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_quote_inside_a_cell_without_quotes_is_a_character(tmp_path):
    (tmp_path / "a").write_text('n,text\n1,5" nail\n2,a "b" c\n')
    assert [source(tmp_path / "a")[number] for number in range(2)] == ['5" nail', 'a "b" c']


def test_rows_become_supervised_examples_and_text(tmp_path):
    (tmp_path / "a.csv").write_text("q,a\n" + "".join(f'"what is\n{i}, in words?",number {i}\n' for i in range(200)))
    rows = [row for i in range(200) for row in (f"what is\n{i}, in words?", f"number {i}")]
    train_tokenizer(rows, TokenizerConfig(vocab_size=300, num_sentinels=10), tmp_path / "model")
    tokenizer = {"path": str(tmp_path / "model"), "vocab_size": 300, "num_sentinels": 10}
    data = {"source": [f"csv:{tmp_path}/*.csv"], "cache_directory": str(tmp_path / "prepared"), "num_workers": 1}
    supervised = {"objective": ["supervised"], "inputs_template": "{q}", "targets_template": "{a}"}
    for more in (supervised, {"text_field": "q"}):
        store = preparation.prepare(
            loader.resolve({"tokenizer": tokenizer, "data": {**data, **more}}), progress=False
        ).stores[0]
        assert store.split("train").num_documents + store.split("heldout").num_documents == 200
