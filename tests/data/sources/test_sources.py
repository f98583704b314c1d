"""Documents of every type of source, in and out of order, and errors of bad data."""

import gzip
import itertools
import json
import os
import pickle
import random
import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
import zstandard
from small_library import small_library

from t5like.config.schema import DataConfig
from t5like.data.sources.files import LARGEST_DOCUMENT, RequiredFields, SourceMissing
from t5like.data.sources.python_stdlib import documents
from t5like.data.sources.source import canonical, open_source
from t5like.errors import ConfigError, DataError

TEXTS = [f"Document {i}: {'é' * (i % 7)}\n\tsecond line\u2028 " + "x" * (i * 37 % 900) for i in range(3000)]
COMPRESS = {"": lambda raw: raw, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def source(spec, **fields):
    return open_source(str(spec), DataConfig(**fields))


def same_documents(opened, texts):
    """Read in order, at random, backwards, and by a copy that went through pickle, as workers get theirs."""
    assert len(opened) == len(texts)
    numbers = random.Random(0).sample(range(len(texts)), min(60, len(texts)))
    for number in itertools.chain(range(len(texts)), numbers, sorted(numbers)[::-1]):
        assert opened[number] == texts[number]
    copy = pickle.loads(pickle.dumps(opened))  # noqa: S301
    assert [copy[number] for number in numbers] == [texts[number] for number in numbers]


def write_jsonl(path, texts, field="text"):
    lines = [json.dumps({"id": i, field: text}) for i, text in enumerate(texts)]
    lines.insert(1, "")  # blank lines are no documents
    path.write_bytes(COMPRESS[path.suffix if path.suffix in COMPRESS else ""](("\n".join(lines) + "\n").encode()))


def test_text_files_are_documents_in_the_order_of_their_names(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, text in (("b.txt", "second\r\n"), ("a.txt", "\ufefffirst"), ("sub/c.txt", " third ")):
        (tmp_path / name).write_bytes(text.encode())
    same_documents(source(f"text:{tmp_path}/**/*.txt", text_documents="file"), ["first", "second\r\n", " third "])


def test_lines_of_text_files_are_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n  two \n \t\nthree")
    (tmp_path / "b.txt").write_bytes(b"four\n")
    same_documents(source(f"text:{tmp_path}/?.txt", text_documents="line"), ["one", "  two ", "three", "four"])


def test_passages_of_a_text_file_concatenate_to_the_file(tmp_path):
    text = "".join(f"line {i} é\n" * (i % 5) for i in range(9000)) + "é" * 100_000 + "\nend"
    (tmp_path / "a.txt").write_text(text, "utf-8")
    opened = source(f"text:{tmp_path}/a.txt", text_documents="passage")
    passages = [opened[number] for number in range(len(opened))]
    sizes = [len(passage.encode()) for passage in passages]
    assert min(sizes[:-1]) >= 2**14 and max(sizes) <= 2**16
    assert "".join(passages) == text and len(passages) > 15
    same_documents(opened, passages)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines_are_read_plain_and_compressed(tmp_path, suffix):
    write_jsonl(tmp_path / f"a.jsonl{suffix}", TEXTS[:1025], "body")
    write_jsonl(tmp_path / f"b.jsonl{suffix}", TEXTS[1025:], "body")
    opened = source(f"jsonl:{tmp_path}/*.jsonl{suffix}", text_field="body")
    same_documents(opened, TEXTS)
    assert opened.size_hint == pytest.approx(sum(len(json.dumps(text)) for text in TEXTS), rel=0.1)


def test_compression_is_detected_by_content_and_not_by_name(tmp_path):
    (tmp_path / "plain.jsonl.gz").write_text('{"text": "a"}\n')
    (tmp_path / "zipped.jsonl").write_bytes(gzip.compress(b'{"text": "b"}\n'))
    same_documents(source(f"jsonl:{tmp_path}/*"), ["a", "b"])


def test_parquet_rows_are_documents_across_row_groups_and_files(tmp_path):
    for name, texts in (("a", TEXTS[:1000]), ("b", TEXTS[1000:1500])):
        table = pa.table({"n": range(len(texts)), "body": texts})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=300)
    same_documents(source(f"parquet:{tmp_path}/*.parquet", text_field="body"), TEXTS[:1500])


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    """A source of a part of the standard library, and the documents of that part."""
    directory = tmp_path_factory.mktemp("data")
    with small_library(directory / "library"):
        return source("python_stdlib", cache_directory=str(directory)), list(documents())


def test_the_standard_library_is_a_tfds_data_set_read_without_tensorflow(stdlib):
    """Equal to what the builder yields, whose records TFDS shuffles."""
    stdlib, stdlib_documents = stdlib
    texts = [stdlib[number] for number in range(len(stdlib))]
    assert {kind for _, kind, _ in stdlib_documents} == {"topic", "docstring", "source"}
    assert sorted(texts) == sorted(text for _, _, text in stdlib_documents)
    same_documents(stdlib, texts)
    assert stdlib.size_hint == pytest.approx(sum(len(text.encode()) for text in texts), rel=0.1)
    assert "tensorflow" not in os.sys.modules


def test_a_tfds_data_set_is_opened_by_name_split_and_field(stdlib, monkeypatch):
    stdlib, _ = stdlib
    directory = stdlib.directory.split("/python_stdlib/")[0]
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", directory)
    name = canonical("python_stdlib").replace("stdlib:", "stdlib/")
    part = source(f"tfds:{name}:1.0.0", split="train[10:30]")
    assert [part[number] for number in range(len(part))] == [stdlib[number] for number in range(10, 30)]
    with pytest.raises(DataError, match="there is no field 'body'; set data.text_field to one of 'kind', 'text'"):
        source(f"tfds:{name}", text_field="body")
    with pytest.raises(DataError, match="data.split='test' is not a split .* \\['train'\\]"):
        source(f"tfds:{name}", split="test")
    with pytest.raises(SourceMissing, match="Dataset no_such_set not found"):
        source("tfds:no_such_set")


def test_held_out_docstrings_are_not_in_the_source_files_of_the_whole_library():
    kinds, keys = {}, []
    for key, kind, text in documents():
        kinds.setdefault(kind, []).append(text)
        keys.append(key)
    assert len(set(keys)) == len(keys)  # TFDS refuses others
    assert len(kinds["topic"]) > 70 and len(set(kinds["docstring"])) == len(kinds["docstring"]) > 4000
    code = "\n".join(kinds["source"])
    first_lines = [text.split("\n")[0] for text in kinds["docstring"][::50]]
    assert sum(line in code for line in first_lines if len(line) > 60) <= 2  # some stand in comments too


# ---- Records ----


def records(opened):
    return [opened.record(number).fields for number in range(len(opened))]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_lines_of_tab_separated_files_are_records_and_texts(tmp_path, suffix):
    rows = [{"a": f"question {i} ", "b": ""} if i % 3 else {"a": "é", "b": f'"{i}'} for i in range(3000)]
    for name, part in (("x", rows[:1023]), ("y", rows[1023:])):
        raw = "\ufeffa\tb\r\n\n" + "".join(f"{row['a']}\t{row['b']}\r\n" for row in part)
        (tmp_path / f"{name}.tsv{suffix}").write_bytes(COMPRESS[suffix](raw.encode()))
    (tmp_path / f"z.tsv{suffix}").write_bytes(COMPRESS[suffix](b"b\ta\n1\t2"))  # columns go by their names
    opened = source(f"tsv:{tmp_path}/*.tsv{suffix}", text_field="a")
    assert records(opened) == [*rows, {"b": "1", "a": "2"}]
    same_documents(opened, [*(row["a"] for row in rows), "2"])


def test_bad_tab_separated_files_are_refused(tmp_path):
    (tmp_path / "a.tsv").write_text("q\ta\n1\t2\n3\n")
    opened = source(f"tsv:{tmp_path}/a.tsv", text_field="q")
    with pytest.raises(DataError, match=r"a.tsv:3 has 1 cells, but the first line names 2 columns \(q, a\)"):
        opened.record(1)
    with pytest.raises(DataError, match="a.tsv:2: there is no field 'text'; set data.text_field to one of 'q', 'a'"):
        source(f"tsv:{tmp_path}/a.tsv")[0]
    (tmp_path / "b.tsv").write_text("q\tq\n1\t2\n")
    with pytest.raises(DataError, match="b.tsv: the first line must name the columns, each differently"):
        source(f"tsv:{tmp_path}/b.tsv").record(0)
    (tmp_path / "c.tsv").write_text("q\ta\n\n")
    with pytest.raises(DataError, match="there are only blank lines below the first"):
        len(source(f"tsv:{tmp_path}/c.tsv"))


NESTED = [
    {
        "q": f"q{i}",
        "n": i,
        "answers": {"text": [f"a{i}"] * (i % 3), "start": [i] * (i % 3)},
        "talk": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": str(i)}],
    }
    for i in range(50)
]


def test_json_and_parquet_give_nested_records(tmp_path):
    wanted = RequiredFields(("q", "answers", "talk"))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in NESTED))
    pq.write_table(pa.Table.from_pylist(NESTED), tmp_path / "a.parquet", row_group_size=7)
    for kind in ("jsonl", "parquet"):
        opened = open_source(f"{kind}:{tmp_path}/a.{kind}", DataConfig(), wanted)
        assert [{name: row[name] for name in wanted.names} for row in records(opened)] == [
            {name: row[name] for name in wanted.names} for row in NESTED
        ]
    assert "n" not in opened.record(0).fields  # a column that nobody wants is not read
    assert opened.record(9).where.endswith("a.parquet: row 2 of row group 1")
    with pytest.raises(DataError, match="there is no field 'x'; name in a template one of 'q', 'n', 'answers'"):
        len(
            open_source(f"parquet:{tmp_path}/a.parquet", DataConfig(), RequiredFields(("q", "x"), "name in a template"))
        )


class StandInTasks(tfds.core.GeneratorBasedBuilder):
    """A data set like SQuAD, with a class label, under the names of tasks."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="one"), tfds.core.BuilderConfig(name="two")]

    def _info(self):
        answers = tfds.features.Sequence({"text": tfds.features.Text(), "start": tfds.features.Scalar(np.int32)})
        features = {
            "inputs": tfds.features.Text(),
            "targets": tfds.features.ClassLabel(names=["no", "yes"]),
            "answers": answers,
            "pair": {"score": tfds.features.Scalar(np.float32)},
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(20):
            answers = [{"text": f"é{i}", "start": i}] * (i % 3)
            inputs = f"{self.builder_config.name} {i}"
            yield i, {"inputs": inputs, "targets": i % 2, "answers": answers, "pair": {"score": i / 2}}


def test_a_task_is_built_once_and_gives_records_with_names_for_labels(tmp_path, monkeypatch):
    module = types.ModuleType("t5like.data.sources.python_tasks")
    module.Tasks, module.NAMES = StandInTasks, ("one", "two")
    monkeypatch.setitem(sys.modules, "t5like.data.sources.python_tasks", module)
    data = DataConfig(cache_directory=str(tmp_path))
    opened = open_source("task:two", data, RequiredFields(("inputs", "targets", "answers", "pair")))
    expected = [
        {
            "inputs": f"two {i}",
            "targets": "yes" if i % 2 else "no",
            "pair": {"score": i / 2},
            "answers": {"text": [f"é{i}"] * (i % 3), "start": [i] * (i % 3)},
        }
        for i in range(20)
    ]
    assert sorted(records(opened), key=lambda row: int(row["inputs"][4:])) == expected
    monkeypatch.setattr(StandInTasks, "_generate_examples", None)
    again = pickle.loads(pickle.dumps(open_source("task:two", data, RequiredFields(("inputs",)))))  # noqa: S301
    assert again[3] == opened.record(3).fields["inputs"]
    with pytest.raises(ConfigError, match="there is no task 'three'; use task: and one of one, two"):
        open_source("task:three", data)
    [features] = tmp_path.glob("tfds/**/two/**/features.json")
    for damaged in (b"", b"[1]", b"{}", b"\xff", b"[" * 100_000):  # which the library fails on in as many ways
        features.write_bytes(damaged)
        with pytest.raises(DataError, match="data.source=task:two in .* can't be read: .+"):
            open_source("task:two", data, RequiredFields(("inputs",)))


def test_texts_without_fields_are_refused_where_fields_are_required(tmp_path):
    with pytest.raises(ConfigError, match="text:a has no fields, which data.objective=supervised needs; use jsonl"):
        open_source("text:a", DataConfig(), RequiredFields(("inputs",)))


# ---- What is wrong with the data ----


BAD = {
    "notes\n": "a.jsonl:3: not valid JSON",
    '["x"]': "a.jsonl:3: a JSON list, but every line must be one JSON object",
    '{"body": "x", "id": 1}': "a.jsonl:3: there is no field 'text'; set data.text_field to one of 'body', 'id'",
    '{"text": 7}': "a.jsonl:3: 'text' is a int, not a text",
    '{"text": null}': "a.jsonl:3: 'text' is a NoneType, not a text",
    b'{"text": "\xff"}': "a.jsonl:3: invalid UTF-8 at byte 10",
    "[" * 100_000: "a.jsonl:3: not valid JSON",
}


@pytest.mark.parametrize(("line", "message"), BAD.items(), ids=range(len(BAD)))
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path, line, message):
    raw = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + raw + b"\n")
    opened = source(f"jsonl:{tmp_path}/a.jsonl")
    assert opened[0] == "fine"
    with pytest.raises(DataError) as refused:
        opened[1]
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_compressed_file_is_refused_and_not_read_short(tmp_path, suffix):
    write_jsonl(tmp_path / f"a.jsonl{suffix}", TEXTS)
    whole = (tmp_path / f"a.jsonl{suffix}").read_bytes()
    (tmp_path / f"a.jsonl{suffix}").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(DataError, match=f"a.jsonl{suffix} can't be read after line [0-9]+: Truncated"):
        len(source(f"jsonl:{tmp_path}/a.jsonl{suffix}"))


def test_missing_empty_and_unreadable_files_are_refused(tmp_path):
    with pytest.raises(SourceMissing, match="no file matches"):
        source(f"text:{tmp_path}/*.txt")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="empty.txt is empty"):
        source(f"text:{tmp_path}/*.txt")
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(DataError, match="only blank lines"):
        len(source(f"text:{tmp_path}/blank.txt", text_documents="line"))
    (tmp_path / "dangling.md").symlink_to("nowhere")
    with pytest.raises(DataError, match="dangling.md can't be read: No such file"):
        source(f"text:{tmp_path}/*.md")


def test_invalid_utf_8_in_a_text_file_is_named_with_its_offset(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match="a.txt: invalid UTF-8 at byte 3"):
        source(f"text:{tmp_path}/a.txt", text_documents="file")[0]


def test_documents_above_64_mib_are_refused(tmp_path):
    with open(tmp_path / "a.txt", "wb") as file:
        file.write(b"a" * (LARGEST_DOCUMENT + 1))
    with pytest.raises(DataError, match="64 MiB"):
        source(f"text:{tmp_path}/a.txt", text_documents="file")[0]
    with pytest.raises(DataError, match="a.txt:1: more than the 64 MiB"):
        len(source(f"text:{tmp_path}/a.txt", text_documents="line"))


def test_bad_parquet_is_refused(tmp_path):
    pq.write_table(pa.table({"body": ["a", None], "n": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet: there is no field 'text'; set data.text_field to one of 'body'"):
        len(source(f"parquet:{tmp_path}/a.parquet"))
    with pytest.raises(DataError, match="row 1 of row group 0: 'body' is a NoneType"):
        source(f"parquet:{tmp_path}/a.parquet", text_field="body")[1]
    with pytest.raises(DataError, match="row 0 of row group 0: 'n' is a int"):
        source(f"parquet:{tmp_path}/a.parquet", text_field="n")[0]
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-10])
    with pytest.raises(DataError, match="a.parquet is not a Parquet file that can be read"):
        len(source(f"parquet:{tmp_path}/a.parquet", text_field="body"))


@pytest.mark.parametrize("spec", ["texts/*.txt", "txt:a", "text:", "python_stdlib:3.9", ""])
def test_unknown_types_of_source_are_refused_with_the_list(spec):
    with pytest.raises(ConfigError, match="must be one of python_stdlib, tfds:NAME, text:GLOB"):
        source(spec)


# ---- Fingerprints ----


def test_fingerprints_depend_on_names_sizes_and_contents_but_not_on_the_directory(tmp_path):
    def fingerprint(directory, name, raw):
        (tmp_path / directory).mkdir(exist_ok=True)
        (tmp_path / directory / name).write_bytes(raw)
        return source(f"text:{tmp_path}/{directory}/*").fingerprint()

    large = bytearray(b"a" * 2**21)
    first = fingerprint("x", "a.txt", large)
    assert fingerprint("y", "a.txt", large) == first
    changed = {fingerprint("z", "b.txt", b"a"), fingerprint("z", "b.txt", b"b"), fingerprint("z", "c.txt", b"b"), first}
    for offset in (0, 2**20, 2**21 - 1):  # at the ends, where edits are most likely; and inside a sampled block
        large[offset // 4096 * 4096 : offset // 4096 * 4096 + 2**15] = b"b" * len(
            large[offset // 4096 * 4096 :][: 2**15]
        )
        changed.add(fingerprint("x", "a.txt", large))
    changed.add(fingerprint("x", "a.txt", large + b"b"))
    assert len(changed) == 8


def test_names_do_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert canonical("text:a/*.txt") == f"text:{tmp_path}/a/*.txt" and canonical("tfds:a/b:1.0.0") == "tfds:a/b:1.0.0"
    assert canonical("jsonl:~/a") == f"jsonl:{os.path.expanduser('~')}/a"
