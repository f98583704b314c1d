"""Tokenizers in Hugging Face directories: what is written makes the same ids, what is read is the same tokenizer."""

import json
import random
import re
from pydoc_data import topics

import pytest
import sentencepiece
import tokenizers

from t5like.config.schema import TokenizerConfig
from t5like.data.tokenizers.tokenizer import Tokenizer, train_tokenizer
from t5like.errors import DataError
from t5like.interop.huggingface import tokenizer_files

TEXTS = list(topics.topics.values())[:8]
ODD = (
    "\t",
    "\n",
    "\r\n",
    "    ",
    "\u2581",
    "\u2581\u2581",
    "<extra_id_0>",
    "<extra_id_3>",
    " ",
    "é",
    "e\u0301",
    "中文",
    "👩‍👩‍👧",
    "\u00a0",
    "\u200b",
    "<0x0A>",
    "<0x41>",
    "ﬁ",
    "Ａ",
    "</s",
    "<un",
    "\x00",
    "\ufeff",
    "###",
)
CODE = (
    "def f(self, x=None):",
    "        return {**a, 'b': [c[0] for c in d]}",
    "# ---- x ----",
    "x = '\\n' if y != 3 else z",
)


def mixed_lines(number: int, runs: bool) -> list[str]:
    """Prose, code and odd characters in any order; also what is short, empty, or (if wanted) a long run."""
    chance = random.Random(0)
    prose = [line for text in TEXTS for line in text.split("\n")]
    lines = ["", " ", "   ", "\n\n", "a", " a ", *TEXTS[:2], "#" * 99, "=" * 61 + " " * 33]
    while len(lines) < number:
        kinds = chance.choices((prose, CODE, ODD), weights=(3, 2, 4), k=chance.randint(1, 6))
        lines.append("".join(chance.choice(kind) for kind in kinds))
    return [line if runs else re.sub(r"([^\w\s])\1+", r"\1", line) for line in lines]


def foreign(path, **options) -> Tokenizer:
    """A tokenizer that SentencePiece trains its own way: spaces folded, one more in front, characters mapped."""
    special = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} if "byte_fallback" not in options else {}
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter("\n".join(TEXTS).split("\n")),
        model_prefix=str(path),
        vocab_size=600,
        minloglevel=2,
        **special,
        **options,
    )
    return Tokenizer.load(path.with_suffix(".model"), num_sentinels=10 if special else 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Tokenizers of every kind: ours, T5's, Llama's."""
    directory, found = tmp_path_factory.mktemp("made"), {}
    for kind in ("unigram", "bpe"):
        config = TokenizerConfig(vocab_size=700, num_sentinels=20, model_type=kind)
        train_tokenizer(TEXTS, config, directory / kind)
        found[kind] = Tokenizer.load(directory / kind, num_sentinels=20)
    found["t5"] = foreign(directory / "t5")
    llama = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    found["llama"] = foreign(directory / "llama", **llama, remove_extra_whitespaces=False)
    return found


def written(tokenizer: Tokenizer, directory, family: str) -> tokenizers.Tokenizer:
    tokenizer_files.write(tokenizer, directory, family=family, max_length=64)
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.mark.parametrize(
    ("kind", "family"), [("unigram", "t5"), ("unigram", "bert"), ("bpe", "gpt2"), ("t5", "t5"), ("llama", "llama")]
)
def test_written_files_give_the_same_ids_and_texts(made, tmp_path, kind, family):
    ours, theirs = made[kind], written(made[kind], tmp_path, family)
    assert theirs.get_vocab_size() == ours.vocab_size
    for line in mixed_lines(1000, runs=kind != "t5"):  # of those it may take others
        if ours.num_sentinels:
            theirs.encode_special_tokens = False
            ids = ours.encode_with_sentinels(line)
            assert theirs.encode(line, add_special_tokens=False).ids == ids
            assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids, keep_special=True)
        theirs.encode_special_tokens = True
        ids = ours.encode(line)
        assert theirs.encode(line, add_special_tokens=False).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids)


def test_names_of_control_and_byte_pieces_are_text(made, tmp_path):
    theirs = written(made["unigram"], tmp_path, "t5")
    theirs.encode_special_tokens = True
    for line in ("</s>", "a<pad>b", "<unk><0x0A></s><0xFF>", "<extra_id_0>"):
        ids = theirs.encode(line, add_special_tokens=False).ids
        assert ids == made["unigram"].encode(line) and theirs.decode(ids, skip_special_tokens=True) == line


def test_special_tokens_of_the_family_are_added_to_a_text(made, tmp_path):
    def ids(kind: str, family: str, *texts: str) -> tuple[list[int], list[int]]:
        (tmp_path / family).mkdir()
        encoding = written(made[kind], tmp_path / family, family).encode(*texts)
        return encoding.ids, encoding.type_ids

    ours = made["unigram"]
    a, b = ours.encode("a"), ours.encode("b")
    assert ids("unigram", "umt5", "a")[0] == [*a, 1]
    assert ids("unigram", "qwen3", "a")[0] == a
    assert ids("llama", "mistral", "a")[0] == [1, *made["llama"].encode("a")]
    mask, cls = ours.sentinel_ids[:2].tolist()
    assert ids("unigram", "bert", "a", "b") == ([cls, *a, 1, *b, 1], [0] * (len(a) + 2) + [1] * (len(b) + 1))
    config = json.loads((tmp_path / "bert/tokenizer_config.json").read_text())
    assert (config["mask_token"], config["cls_token"], config["sep_token"]) == ("<extra_id_0>", "<extra_id_1>", "</s>")
    config = json.loads((tmp_path / "mistral/tokenizer_config.json").read_text())
    assert config["bos_token"] == "<s>" and "pad_token" not in config and config["model_max_length"] == 64


@pytest.mark.parametrize(("kind", "family"), [("unigram", "t5"), ("bpe", "llama"), ("llama", "llama")])
def test_a_written_tokenizer_is_read_unchanged(made, tmp_path, kind, family):
    written(made[kind], tmp_path, family)
    assert tokenizer_files.read(tmp_path).hash == made[kind].hash


def test_possible_differences_are_reported(made, tmp_path):
    said = {kind: tokenizer_files.write(each, tmp_path, family="t5", max_length=64) for kind, each in made.items()}
    assert said["unigram"] is said["bpe"] is said["llama"] is None
    assert "####" in said["t5"] and "combining marks" in said["t5"] and "\n" not in said["t5"]


def test_sentinels_among_the_pieces_keep_their_ids(tmp_path):
    names = [f"<extra_id_{number}>" for number in range(9, -1, -1)]
    inside = foreign(tmp_path / "inside", user_defined_symbols=names)
    theirs = written(inside, tmp_path, "mt5")
    ids = theirs.encode("a<extra_id_0> b <extra_id_9>.", add_special_tokens=False).ids
    assert ids == inside.encode_with_sentinels("a<extra_id_0> b <extra_id_9>.") and inside.sentinel_ids[9] in ids
    assert tokenizer_files.read(tmp_path).hash == inside.hash


# ---- Directories of others ----


def directory_of(tokenizer: Tokenizer, path, **files) -> None:
    (path / "spiece.model").write_bytes(tokenizer.model_bytes)
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("files", "number"),
    [
        ({"config": {"model_type": "t5"}}, 100),  # T5Tokenizer's default
        ({"tokenizer_config": {"extra_ids": 7}}, 7),
        ({"tokenizer_config": {"additional_special_tokens": ["<extra_id_0>", "<extra_id_1>"]}}, 2),
        ({"added_tokens": {"<extra_id_0>": 601, "<extra_id_1>": 600}}, 2),
        ({"tokenizer_config": {"added_tokens_decoder": {"600": {"content": "<extra_id_0>"}}}}, 1),
        ({}, 0),
    ],
)
def test_the_number_of_sentinels_is_read_from_the_files(made, tmp_path, files, number):
    directory_of(made["t5"], tmp_path, **files)
    assert tokenizer_files.read(tmp_path).num_sentinels == number


def test_the_tokenizer_json_is_read_if_the_model_lacks_added_tokens(made, tmp_path):
    directory_of(made["llama"], tmp_path, added_tokens={"<|user|>": 600})
    with pytest.raises(DataError, match=r"lacks the added token '<\|user\|>'"):
        tokenizer_files.read(tmp_path)
    theirs = written(made["llama"], tmp_path, "llama")
    theirs.add_special_tokens(["<|user|>"])
    theirs.save(str(tmp_path / "tokenizer.json"))
    read = tokenizer_files.read(tmp_path)
    assert read.is_json and read.vocab_size == 601 and read.encode("a b") == made["llama"].encode("a b")
    (tmp_path / "out").mkdir()
    written(read, tmp_path / "out", "llama")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_a_tokenizer_json_without_sentinels_gets_them(made, tmp_path):
    content = json.loads(written(made["t5"], tmp_path, "llama").to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    ours = Tokenizer(json.dumps(content).encode(), num_sentinels=4)
    theirs = written(ours, tmp_path, "t5")
    assert theirs.encode("a<extra_id_3>b").ids == [*ours.encode_with_sentinels("a<extra_id_3>b"), 1]
    assert tokenizer_files.read(tmp_path).sentinel_ids.tolist() == [603, 602, 601, 600]


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_text("IQ== 0\n")  # Llama 3's, of another kind
    with pytest.raises(DataError, match="no tokenizer that t5like reads"):
        tokenizer_files.read(tmp_path)
    (tmp_path / "tokenizer.json").write_text("")
    with pytest.raises(DataError, match="tokenizer.json"):
        tokenizer_files.read(tmp_path)
