"""tokenizer.json files: ids and texts equal the `tokenizers` library's, text is never special, BERT's [MASK]."""

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
    """The type of GPT-2."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def llama_3():
    """The same with a beginning, whose files say which ids are special, and tokens added that are not."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>"])
    tokenizer.add_tokens(["<think>"])
    begin = [("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=begin)
    return tokenizer


def word_piece():
    """The type of BERT."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special))
    return tokenizer


def unigram():
    """The type of T5, with sentinels."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens([f"<extra_id_{number}>" for number in range(9, -1, -1)])
    return tokenizer


TYPES = (byte_level, llama_3, word_piece, unigram)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A tokenizer.json of each type in its own directory."""
    by_type = {}
    for model_type in TYPES:
        by_type[model_type] = directory = tmp_path_factory.mktemp(model_type.__name__)
        model_type().save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|eot_id|>"}}
    (by_type[llama_3] / "tokenizer_config.json").write_text(json.dumps(config))
    return by_type


@pytest.fixture(scope="module")
def loaded(directories):
    """For each type: the tokenizer, and the library's, which treats no text as special either."""
    by_type = {}
    for model_type, directory in directories.items():
        reference = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        reference.encode_special_tokens = True
        by_type[model_type] = (Tokenizer.load(directory / "tokenizer.json", num_sentinels=None), reference)
    return by_type


@pytest.mark.parametrize("model_type", TYPES)
def test_ids_and_texts_are_those_of_the_library(loaded, model_type):
    tokenizer, reference = loaded[model_type]
    for line, ids in zip(LINES, tokenizer.encode_batch(LINES), strict=True):
        assert ids.tolist() == reference.encode(line, add_special_tokens=False).ids == tokenizer.encode(line)
        assert tokenizer.decode(ids) == reference.decode(ids.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("model_type", TYPES)
def test_text_never_becomes_special_tokens(loaded, model_type):
    tokenizer, _ = loaded[model_type]
    ids = np.array(tokenizer.encode(SPECIAL))
    assert (tokenizer.ordinary_V[ids] | (ids == tokenizer.unk_id)).all()
    assert tokenizer.vocab_size == len(tokenizer.ordinary_V) == len(tokenizer.bytes_V) == len(tokenizer.begins_word_V)


def test_special_ids_come_from_the_files_or_from_usual_names(loaded):
    ids = {
        model_type.__name__: (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.bos_id)
        for model_type, (tokenizer, _) in loaded.items()
    }
    end = loaded[byte_level][1].token_to_id("<|endoftext|>")
    assert ids == {
        "byte_level": (0, end, None, None),
        "llama_3": (0, end + 2, None, end + 1),
        "word_piece": (0, 3, 1, None),
        "unigram": (0, 1, 2, None),
    }
    tokenizer, _ = loaded[llama_3]
    text = tokenizer.decode([end + 1, *tokenizer.encode("hi"), end + 2, 0])
    assert text == "<|begin_of_text|>hi" + tokenizer.decode([0])  # id 0 is text


def test_eos_comes_from_the_models_config_if_the_files_do_not_name_it(directories, tmp_path):
    content = (directories[llama_3] / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content.replace("<|endoftext|>", "<|bye|>"))
    with pytest.raises(DataError, match="no end-of-sequence token"):
        Tokenizer.load(tmp_path / "tokenizer.json", num_sentinels=0)
    (tmp_path / "config.json").write_text('{"eos_token_id": [402, 400]}')
    assert Tokenizer.load(tmp_path / "tokenizer.json", num_sentinels=0).eos_id == 402


def test_sentinel_tokens_of_the_file_are_used(loaded):
    tokenizer, reference = loaded[unigram]
    assert tokenizer.num_sentinels == 10 and tokenizer.sentinel_ids.tolist() == list(range(409, 399, -1))
    text = "the<extra_id_1> cat <extra_id_0>"
    reference.encode_special_tokens = False
    ids = reference.encode(text, add_special_tokens=False).ids
    reference.encode_special_tokens = True
    assert tokenizer.encode_with_sentinels(text) == ids and {408, 409} < set(ids)
    assert not {408, 409} & set(tokenizer.encode(text))
    with pytest.raises(DataError, match="extra_id_10"):
        tokenizer.encode_with_sentinels("<extra_id_10>")


def test_sentinels_are_above_the_vocabulary_if_it_has_none(directories):
    path = directories[unigram] / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = content["added_tokens"][:3]
    tokenizer = Tokenizer(json.dumps(content).encode(), num_sentinels=5)
    assert tokenizer.vocab_size == 405 and tokenizer.sentinel_ids.tolist() == [404, 403, 402, 401, 400]
    assert tokenizer.decode(tokenizer.encode_with_sentinels("a<extra_id_4>")) == "a<extra_id_4>"


def test_a_tokenizer_like_berts_masks_with_its_own_tokens(loaded):
    tokenizer, _ = loaded[word_piece]
    assert tokenizer.sentinel_ids.tolist() == [4, 2] and tokenizer.eos_id == 3
    assert tokenizer.encode_with_sentinels("a [MASK]") == tokenizer.encode_with_sentinels("a <extra_id_0>")
    assert tokenizer.decode([2, *tokenizer.encode_with_sentinels("the [MASK] of"), 3]) == "[CLS] the [MASK] of"
    config = small(model={"architecture": "encoder"}, data={"noise_density": 0.5})
    tokens = np.array([tokenizer.encode("The statement is executed by the interpreter.")[:10]], np.int32)
    batch = masking.mask_tokens(config, Vocabulary.of(tokenizer), TextWindows(tokens, None, np.array([3], np.uint64)))
    row = batch.encoder_BS[0].tolist()
    assert row[0] == 2 and row[-1] == 3 and row.count(4) == 4  # 80 % of the 5 that are chosen


def test_masked_language_models_may_pad_with_any_id_and_begin_texts_with_bos(directories, tmp_path):
    tokenizer = tokenizers.Tokenizer.from_file(str(directories[llama_3] / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|mask|>", "<|pad|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    names = {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>", "mask": "<|mask|>", "pad": "<|pad|>"}  # as EuroBERT
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({f"{key}_token": name for key, name in names.items()}))
    loaded = Tokenizer.load(tmp_path / "tokenizer.json", num_sentinels=None)
    bos, eos, mask, _ = map(tokenizer.token_to_id, names.values())
    assert loaded.sentinel_ids.tolist() == [mask, bos] and loaded.eos_id == eos and not loaded.pads_with_a_token
    assert loaded.encode_with_sentinels("a<extra_id_0>") == [*loaded.encode("a"), mask]


def test_bytes_add_up_and_words_begin_where_spaces_do(loaded):
    tokenizer, _ = loaded[byte_level]
    text = "The value é\n  of 中 x"
    ids = tokenizer.encode(text)
    assert tokenizer.bytes_V[ids].sum() == len(text.encode())
    for model_type in TYPES:
        tokenizer, _ = loaded[model_type]
        begins = tokenizer.begins_word_V[tokenizer.encode("statement interpreter executed")]
        first_has_no_space = model_type in (byte_level, llama_3)
        assert begins.sum() == 3 - first_has_no_space and begins[0] != first_has_no_space


def test_the_bundle_is_one_file_with_the_original_files(directories, loaded, tmp_path):
    tokenizer, _ = loaded[llama_3]
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    again = Tokenizer.load(tmp_path / "tokenizer.model", num_sentinels=0)
    assert again.hash == tokenizer.hash and again.eos_id == tokenizer.eos_id
    there = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301 -- our own, as it travels to worker processes
    assert there.hash == tokenizer.hash and there.encode("hello") == tokenizer.encode("hello")
    assert {name: text.encode() for name, text in again.files.items()} == {
        path.name: path.read_bytes() for path in directories[llama_3].iterdir()
    }


def test_ids_in_gaps_have_no_token(directories):
    content = json.loads((directories[byte_level] / "tokenizer.json").read_text())
    last = next(name for name, token in content["model"]["vocab"].items() if token == 399)
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) != last]
    content["model"]["vocab"][last] = 450  # above the added token, 400
    tokenizer = Tokenizer(json.dumps(content).encode(), num_sentinels=0)
    assert tokenizer.vocab_size == 451 and not tokenizer.ordinary_V[401:450].any() and tokenizer.ordinary_V[450]
    assert tokenizer.decode(tokenizer.encode(TEXTS[1])) == TEXTS[1]
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
def test_unusable_files_are_refused_in_one_line(directories, tmp_path, rule):
    content = json.loads((directories[byte_level] / "tokenizer.json").read_text())
    (tmp_path / "t.json").write_bytes(broken(content)[rule])
    with pytest.raises(DataError, match=rule) as refused:
        Tokenizer.load(tmp_path / "t.json", num_sentinels=0)
    assert "\n" not in str(refused.value) and "t.json" in str(refused.value)


def test_sentinels_need_padding_at_id_0(directories):
    with pytest.raises(DataError, match="no pad token.*must be id 0"):
        Tokenizer.load(directories[byte_level] / "tokenizer.json", num_sentinels=3)


def test_another_number_of_sentinels_is_refused_with_the_right_one(directories):
    for model_type, number in ((word_piece, 2), (unigram, 10)):
        with pytest.raises(DataError, match=f"use tokenizer.num_sentinels={number}"):
            Tokenizer.load(directories[model_type] / "tokenizer.json", num_sentinels=100)


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
def test_a_file_with_impossible_values_is_refused(change):
    right = {"model": {"type": "BPE", "vocab": {"a": 0, "</s>": 1}, "merges": []}, "added_tokens": []}
    assert Tokenizer(json.dumps(right).encode(), num_sentinels=None).vocab_size == 2
    with pytest.raises(DataError):
        Tokenizer(json.dumps({**right, **change}).encode(), num_sentinels=None)
