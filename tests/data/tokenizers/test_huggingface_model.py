"""tokenizer.json files: the ids and texts of the `tokenizers` library, nothing typed is special, BERT's own [MASK]."""

import json
import pickle
import sys
from pydoc_data import topics

import numpy as np
import pytest
import tokenizers
from conftest import small
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from t5like.data.objectives import masking
from t5like.data.objectives.windows import TextWindows
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.data.tokenizers.vocabulary import Vocabulary
from t5like.errors import DataError

TEXTS = list(topics.topics.values())[:8]
LINES = [line for text in TEXTS[:3] for line in text.split("\n")][:150] + [
    "",
    "  two  spaces \t tab\r\n",
    "emoji 👩‍👩‍👧 é e\u0301 中文 \u2581 Ａ",
    "def f(x):\n        return x  # 4.5e-3",
]
SPECIAL = "</s> <|endoftext|> <pad> [CLS] [MASK] [SEP] <unk>"


def byte_level():
    """GPT-2's kind."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens(["<|endoftext|>"])
    return made


def llama_3():
    """The same with a beginning, whose files say which ids are special, and tokens added that are not."""
    made = byte_level()
    made.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>"])
    made.add_tokens(["<think>"])
    begin = [("<|begin_of_text|>", made.token_to_id("<|begin_of_text|>"))]
    made.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=begin)
    return made


def word_piece():
    """BERT's kind."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special))
    return made


def unigram():
    """T5's kind, with sentinels above."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    made.add_special_tokens([f"<extra_id_{number}>" for number in range(9, -1, -1)])
    return made


KINDS = (byte_level, llama_3, word_piece, unigram)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A tokenizer.json of each kind in a directory of its own."""
    found = {}
    for kind in KINDS:
        found[kind] = directory = tmp_path_factory.mktemp(kind.__name__)
        kind().save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|eot_id|>"}}
    (found[llama_3] / "tokenizer_config.json").write_text(json.dumps(config))
    return found


@pytest.fixture(scope="module")
def loaded(directories):
    """For each kind: ours, and the library's, which takes nothing for special either."""
    found = {}
    for kind, directory in directories.items():
        theirs = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        theirs.encode_special_tokens = True
        found[kind] = (Tokenizer.load(directory / "tokenizer.json", num_sentinels=None), theirs)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_those_of_the_library(loaded, kind):
    ours, theirs = loaded[kind]
    for line, ids in zip(LINES, ours.encode_batch(LINES), strict=True):
        assert ids.tolist() == theirs.encode(line, add_special_tokens=False).ids == ours.encode(line)
        assert ours.decode(ids) == theirs.decode(ids.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_typed_is_special(loaded, kind):
    ours, _ = loaded[kind]
    ids = np.array(ours.encode(SPECIAL))
    assert (ours.ordinary_V[ids] | (ids == ours.unk_id)).all()
    assert ours.vocab_size == len(ours.ordinary_V) == len(ours.bytes_V) == len(ours.begins_word_V)


def test_special_ids_are_found_in_the_files_or_by_their_usual_names(loaded):
    ids = {kind.__name__: (ours.pad_id, ours.eos_id, ours.unk_id, ours.bos_id) for kind, (ours, _) in loaded.items()}
    end = loaded[byte_level][1].token_to_id("<|endoftext|>")
    assert ids == {
        "byte_level": (0, end, None, None),
        "llama_3": (0, end + 2, None, end + 1),
        "word_piece": (0, 3, 1, None),
        "unigram": (0, 1, 2, None),
    }
    ours, _ = loaded[llama_3]
    text = ours.decode([end + 1, *ours.encode("hi"), end + 2, 0])
    assert text == "<|begin_of_text|>hi" + ours.decode([0])  # id 0 is text


def test_the_models_config_names_the_end_where_the_files_do_not(directories, tmp_path):
    content = (directories[llama_3] / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content.replace("<|endoftext|>", "<|bye|>"))
    with pytest.raises(DataError, match="no end-of-sequence token"):
        Tokenizer.load(tmp_path / "tokenizer.json", num_sentinels=0)
    (tmp_path / "config.json").write_text('{"eos_token_id": [402, 400]}')
    assert Tokenizer.load(tmp_path / "tokenizer.json", num_sentinels=0).eos_id == 402


def test_sentinels_are_its_own(loaded):
    ours, theirs = loaded[unigram]
    assert ours.num_sentinels == 10 and ours.sentinel_ids.tolist() == list(range(409, 399, -1))
    text = "the<extra_id_1> cat <extra_id_0>"
    theirs.encode_special_tokens = False
    ids = theirs.encode(text, add_special_tokens=False).ids
    theirs.encode_special_tokens = True
    assert ours.encode_with_sentinels(text) == ids and {408, 409} < set(ids)
    assert not {408, 409} & set(ours.encode(text))
    with pytest.raises(DataError, match="extra_id_10"):
        ours.encode_with_sentinels("<extra_id_10>")


def test_sentinels_lie_above_where_it_has_none(directories):
    path = directories[unigram] / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = content["added_tokens"][:3]
    ours = Tokenizer(json.dumps(content).encode(), num_sentinels=5)
    assert ours.vocab_size == 405 and ours.sentinel_ids.tolist() == [404, 403, 402, 401, 400]
    assert ours.decode(ours.encode_with_sentinels("a<extra_id_4>")) == "a<extra_id_4>"


def test_a_tokenizer_like_berts_masks_with_its_own_tokens(loaded):
    ours, _ = loaded[word_piece]
    assert ours.sentinel_ids.tolist() == [4, 2] and ours.eos_id == 3
    assert ours.encode_with_sentinels("a [MASK]") == ours.encode_with_sentinels("a <extra_id_0>")
    assert ours.decode([2, *ours.encode_with_sentinels("the [MASK] of"), 3]) == "[CLS] the [MASK] of"
    config = small(model={"architecture": "encoder"}, data={"noise_density": 0.5})
    tokens = np.array([ours.encode("The statement is executed by the interpreter.")[:10]], np.int32)
    batch = masking.mask_tokens(config, Vocabulary.of(ours), TextWindows(tokens, None, np.array([3], np.uint64)))
    row = batch.encoder_BS[0].tolist()
    assert row[0] == 2 and row[-1] == 3 and row.count(4) == 4  # 80 % of the 5 that are chosen


def test_bytes_add_up_and_words_begin_where_spaces_do(loaded):
    ours, _ = loaded[byte_level]
    text = "The value é\n  of 中 x"
    ids = ours.encode(text)
    assert ours.bytes_V[ids].sum() == len(text.encode())
    for kind in KINDS:
        ours, _ = loaded[kind]
        begins = ours.begins_word_V[ours.encode("statement interpreter executed")]
        first_has_no_space = kind in (byte_level, llama_3)
        assert begins.sum() == 3 - first_has_no_space and begins[0] != first_has_no_space


def test_it_is_one_file_that_keeps_what_it_was_made_of(directories, loaded, tmp_path):
    ours, _ = loaded[llama_3]
    (tmp_path / "tokenizer.model").write_bytes(ours.model_bytes)
    again = Tokenizer.load(tmp_path / "tokenizer.model", num_sentinels=0)
    assert again.hash == ours.hash and again.eos_id == ours.eos_id
    there = pickle.loads(pickle.dumps(ours))  # noqa: S301 -- our own, as it travels to worker processes
    assert there.hash == ours.hash and there.encode("hello") == ours.encode("hello")
    assert {name: text.encode() for name, text in again.files.items()} == {
        path.name: path.read_bytes() for path in directories[llama_3].iterdir()
    }


def test_ids_without_a_token_are_nobodys(directories):
    content = json.loads((directories[byte_level] / "tokenizer.json").read_text())
    last = next(name for name, token in content["model"]["vocab"].items() if token == 399)
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) != last]
    content["model"]["vocab"][last] = 450  # above the added token, 400
    ours = Tokenizer(json.dumps(content).encode(), num_sentinels=0)
    assert ours.vocab_size == 451 and not ours.ordinary_V[401:450].any() and ours.ordinary_V[450]
    assert ours.decode(ours.encode(TEXTS[1])) == TEXTS[1]
    content["added_tokens"][0]["id"] = 420
    with pytest.raises(DataError, match=r"<\|endoftext\|>' has id 420, but tokenizers .* gives it 400"):
        Tokenizer(json.dumps(content).encode(), num_sentinels=0)


def broken(content: dict) -> dict[str, bytes]:
    unknown = content | {"pre_tokenizer": {"type": "Sprinkle"}}
    return {
        "can't be read by tokenizers": json.dumps(unknown).encode(),
        "no model with a vocab": b'{"version": "1.0"}',
        "is not JSON, or is truncated": json.dumps(content).encode()[:5000],
        "not UTF-8": b'{"version": "\xff"}',
    }


@pytest.mark.parametrize("rule", broken({}))
def test_what_can_not_serve_is_refused_in_one_line(directories, tmp_path, rule):
    content = json.loads((directories[byte_level] / "tokenizer.json").read_text())
    (tmp_path / "t.json").write_bytes(broken(content)[rule])
    with pytest.raises(DataError, match=rule) as refused:
        Tokenizer.load(tmp_path / "t.json", num_sentinels=0)
    assert "\n" not in str(refused.value) and "t.json" in str(refused.value)


def test_sentinels_need_padding_at_id_0(directories):
    with pytest.raises(DataError, match="no pad token.*must be id 0"):
        Tokenizer.load(directories[byte_level] / "tokenizer.json", num_sentinels=3)


def test_another_number_of_sentinels_is_refused_with_the_right_one(directories):
    for kind, number in ((word_piece, 2), (unigram, 10)):
        with pytest.raises(DataError, match=f"use tokenizer.num_sentinels={number}"):
            Tokenizer.load(directories[kind] / "tokenizer.json", num_sentinels=100)


def test_lone_surrogates_are_refused(loaded):
    with pytest.raises(DataError, match="surrogate"):
        loaded[byte_level][0].encode("a\ud800")


def test_the_missing_library_is_named(loaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"pip install 't5like\[hf\]'"):
        Tokenizer(loaded[byte_level][0].model_bytes, num_sentinels=0)


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "BPE", "vocab": {"a": -5, "</s>": 1}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": "x", "</s>": 1}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": 10**13, "</s>": 1}, "merges": []}},
        {"post_processor": {"type": "TemplateProcessing", "single": []}},
        {"post_processor": {"type": "BertProcessing"}},
        {"model": {"type": "BPE", "vocab": {"a": 0, "</s>": 1}, "merges": [], "unk_token": ["x"]}},
        {"model": {"type": "BPE", "vocab": {"a": 0, "</s>": 1}, "merges": [7]}},
    ],
)
def test_a_file_that_says_what_can_not_be_is_refused(change):
    right = {"model": {"type": "BPE", "vocab": {"a": 0, "</s>": 1}, "merges": []}, "added_tokens": []}
    assert Tokenizer(json.dumps(right).encode(), num_sentinels=None).vocab_size == 2
    with pytest.raises(DataError):
        Tokenizer(json.dumps({**right, **change}).encode(), num_sentinels=None)
