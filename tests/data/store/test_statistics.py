"""Statistics of a source's text, compared with counts of the texts, and short names of sources."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import small

from t5like.config import loader
from t5like.data.sources.names import source_names
from t5like.data.store import preparation, statistics
from t5like.data.store.manifest import COUNTS
from t5like.data.store.token_store import SPLITS
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.errors import ConfigError

TEXTS = ["ba de fi", "go ba", "東京 ba", "ba de fi", "go", "ba de fi", "ka le mi no", "größer", "go ", ""] + [
    f"pu {number}" for number in range(20)
]


def test_a_store_counts_documents_bytes_duplicates_and_what_the_vocabulary_lacks(trained, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    config = small(
        tokenizer={"path": str(trained / "tokenizer.model"), "vocab_size": 400},
        data={
            "source": f"jsonl:{tmp_path}/rows.jsonl",
            "cache_directory": str(tmp_path),
            "heldout_fraction": 0.3,
        },
    )
    prepared = preparation.prepare(config, progress=False)
    manifest, [store] = prepared.stores[0].manifest, prepared.stores
    tokenizer = Tokenizer.load(trained / "tokenizer.model", num_sentinels=20)
    counts = {name: sum(manifest["splits"][split][name] for split in SPLITS) for name in COUNTS}
    tokens = [tokenizer.name(token) for text in TEXTS for token in tokenizer.encode(text)]
    assert counts == {
        "documents": len(TEXTS),
        "tokens": len(tokens) + len(TEXTS),
        "bytes": sum(len(text.encode()) for text in TEXTS),
        "unknown": 0,
        "byte_fallback": sum(token.startswith("<0x") for token in tokens),
    }
    assert counts["byte_fallback"] >= 6 and manifest["duplicates"] == 2
    texts = [tokenizer.decode(store.split("train").windows([0], store.split("train").num_tokens)[0], keep_special=True)]
    assert manifest["splits"]["train"]["bytes"] == len("".join(texts).replace("</s>", "").encode())

    # Begun by a version that counted less, and killed before the manifest.
    [record] = store.directory.glob("pieces/*.json")
    older = json.loads(record.read_text())
    del older["files"]["00000.hashes"], older["splits"]["heldout"]["bytes"]
    record.write_text(json.dumps(older))
    for path in (store.directory / "manifest.json", store.directory / "pieces" / "00000.hashes"):
        path.unlink()
    again = preparation.prepare(config, progress=False).stores[0].manifest
    assert "duplicates" not in again and "bytes" not in again["splits"]["heldout"]
    assert again["splits"]["train"] == manifest["splits"]["train"]


def test_lines_are_aligned_and_omit_what_an_older_store_lacks(tmp_path):
    split = {"documents": 7441, "tokens": 3577142, "bytes": 14308568, "unknown": 3, "byte_fallback": 35768}
    new = {"splits": {"train": split, "heldout": {"documents": 1, "tokens": 52}}, "duplicates": 12}
    plain = {"documents": 5, "tokens": 9}
    old = {"splits": {"train": plain, "heldout": plain}}
    stores = [SimpleNamespace(manifest=manifest) for manifest in (new, old)]
    assert statistics.lines(["wiki", "b"], stores, ["text:w", "text:b"]) == [
        "wiki  7,441 documents  3,577,142 tokens  4.00 bytes/token  1.00 % unknown or in bytes  duplicates 12"
        "  held out 1 document,   52 tokens  text:w",
        "b         5 documents          9 tokens                                                             "
        "  held out 5 documents,   9 tokens  text:b",
    ]


def test_unknown_tokens_are_counted_for_models_without_byte_fallback():
    model = SimpleNamespace(unk_id=2, byte_fallback_V=np.zeros(9, bool))
    assert statistics.count_tokens(model, np.array([3, 2, 2, 1])) == {"unknown": 2, "byte_fallback": 0}


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["text:/home/me/wiki/**/*.txt", "text:/home/me/books/*"], "wiki books"),
        (["jsonl:wiki/train.jsonl.gz", "jsonl:books/train.jsonl"], "wiki books"),
        (["text:a/x.txt", "text:b/x.txt", "text:b/y.txt"], "a-x b-x y"),
        (["text:a/b/t", "text:a/c/t", "text:d/b/t"], "a-b c d-b"),
        (["text:d/*.en", "text:d/*.de", "text:d/c.de"], "en-d de-d c.de"),
        (["tfds:c4/en:3.1.0", "hf:allenai/c4/de", "python_stdlib"], "c4-en c4-de python_stdlib"),
        (["reasoning_gym:gcd?size=100&max_value=9", "reasoning_gym:lcm"], "gcd lcm"),
        (["hf:/data/my set", "task:summarization", "text:新聞/*.txt"], "my_set summarization 新聞"),
        (["text:a.txt", "text:a.txt", "text:b.txt"], "a a-2 b"),
        (["text:a.txt", "jsonl:a.txt"], "text jsonl"),
        (["text:*.txt"], "text"),
        (["text:[/]/?"], "text"),
    ],
)
def test_sources_are_named_by_what_distinguishes_them(sources, names):
    assert source_names(small(data={"source": sources}).data) == tuple(names.split())


def test_valid_source_names_are_used_and_others_refused():
    sources = {"source": ["text:a.txt", "text:b.txt"]}
    assert source_names(small(data={**sources, "source_names": ["x", "y.1"]}).data) == ("x", "y.1")
    for names in (["x"], ["x", "x"], ["x", "a/b"], ["x", ""]):
        with pytest.raises(
            ConfigError, match=r"data.source_names=.* must be 2 different names .*; use source1,source2"
        ):
            loader.resolve({"data": {**sources, "source_names": names}})
