"""SentencePiece models: exact text, T5's sentinels, and refused models."""

from pydoc_data import topics

import numpy as np
import pytest
import sentencepiece

from t5like.config.schema import TokenizerConfig
from t5like.data.tokenizers.tokenizer import Tokenizer, train_tokenizer
from t5like.errors import DataError

TEXTS = list(topics.topics.values())[:8]  # about 60,000 characters
CONFIG = TokenizerConfig(vocab_size=500, num_sentinels=20)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(TEXTS, CONFIG, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(path):
    return Tokenizer.load(path, num_sentinels=20)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a",
        "  two  spaces ",
        "\n\n\ttab\r\nline",
        "quick \u2581 real underline \u2581\u2581",
        "emoji 👩‍👩‍👧 é e\u0301 中文 \u202e",
        "\x00 nul \x1f",
        "<extra_id_0> <pad> </s> <unk> <0x0A> <s>",
        "\ufeffmark \ufffd \U0010ffff",
        "a" * 5000,
        "".join(map(chr, range(1, 0x300))),
    ],
)
def test_every_text_survives_encoding_and_decoding(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(2 < i < 480 for i in ids)  # text never becomes a control id or a sentinel
    assert [list(row) for row in tokenizer.encode_batch([text, "x", text])] == [ids, tokenizer.encode("x"), ids]


def test_random_unicode_survives(tokenizer):
    rng = np.random.default_rng(0)
    for _ in range(200):
        points = rng.choice([0x80, 0x800, 0x10000, 0x110000], 30)
        text = "".join(chr(c) for c in (rng.random(30) * points).astype(int) if not 0xD800 <= c < 0xE000)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_ids_and_sentinels_are_those_of_t5(tokenizer):
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)
    assert tokenizer.vocab_size == 500
    assert tokenizer.sentinel_ids.tolist() == list(range(499, 479, -1))
    assert tokenizer.decode([499, 498]) == "<extra_id_0><extra_id_1>"
    assert tokenizer.encode_with_sentinels("a<extra_id_1>b") == [*tokenizer.encode("a"), 498, *tokenizer.encode("b")]


def test_t5_style_models_get_sentinels_above_their_pieces(path):
    assert Tokenizer.load(path, num_sentinels=100).sentinel_ids[0] == 480 + 99  # 32,000 pieces + 100: 32,099


def test_the_same_texts_make_the_same_model(path, tmp_path):
    train_tokenizer(TEXTS, CONFIG, tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == path.read_bytes()


def test_bpe_is_exact_too(tmp_path):
    train_tokenizer(TEXTS, TokenizerConfig(vocab_size=400, num_sentinels=0, model_type="bpe"), tmp_path / "m")
    tokenizer = Tokenizer.load(tmp_path / "m", num_sentinels=0)
    assert tokenizer.decode(tokenizer.encode(TEXTS[3])) == TEXTS[3] and tokenizer.vocab_size == 400


def test_the_hash_depends_on_model_and_sentinels(path, tokenizer, tmp_path):
    assert Tokenizer.load(path, num_sentinels=20).hash == tokenizer.hash != Tokenizer.load(path, num_sentinels=21).hash


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(DataError, match="surrogate"):
        tokenizer.encode("a\ud800")


def test_a_vocabulary_too_large_for_the_text_is_refused_with_a_size_that_works(tmp_path):
    with pytest.raises(
        DataError, match="tokenizer.vocab_size=30000 is too large.*use tokenizer.vocab_size="
    ) as refused:
        train_tokenizer(TEXTS, TokenizerConfig(vocab_size=30_000), tmp_path / "m")
    assert not list(tmp_path.iterdir())
    works = int(str(refused.value).split("use tokenizer.vocab_size=")[1].split()[0])
    train_tokenizer(TEXTS, TokenizerConfig(vocab_size=works), tmp_path / "m")
    assert Tokenizer.load(tmp_path / "m", num_sentinels=100).vocab_size == works


def test_a_vocabulary_size_other_than_the_config_s_is_refused(tokenizer):
    with pytest.raises(DataError, match="tokenizer.vocab_size=600.*500"):
        tokenizer.check(TokenizerConfig(vocab_size=600, num_sentinels=20))


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html>login</html>", None])
def test_files_that_are_not_models_are_refused(tmp_path, path, content):
    file = tmp_path / "bad.model"
    file.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with pytest.raises(DataError, match="bad.model"):
        Tokenizer.load(file, num_sentinels=0)
    with pytest.raises(DataError, match="missing.model"):
        Tokenizer.load(tmp_path / "missing.model", num_sentinels=0)


def foreign(tmp_path, **options):
    path = tmp_path / "foreign"
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(path),
        vocab_size=400,
        minloglevel=2,
        byte_fallback=True,
        **options,
    )
    return path.with_suffix(".model")


def test_sentinel_pieces_of_a_model_are_detected_and_checked(tmp_path):
    pieces = [f"<extra_id_{i}>" for i in range(9, -1, -1)]
    inside = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "user_defined_symbols": pieces}
    tokenizer_path = foreign(tmp_path, **inside)
    try:
        tokenizer = Tokenizer.load(tokenizer_path, num_sentinels=10)
    except DataError as error:  # if they are not the highest ids, the message says so
        assert "extra_id" in str(error)
    else:
        assert tokenizer.vocab_size == 400 and tokenizer.decode(tokenizer.sentinel_ids[:1].tolist()) == "<extra_id_0>"
    with pytest.raises(DataError, match="sentinel"):
        Tokenizer.load(tokenizer_path, num_sentinels=11)


def test_a_model_without_a_pad_id_works_only_for_decoders(tmp_path):
    path = foreign(tmp_path)  # SentencePiece's defaults, as Llama's: unk 0, bos 1, eos 2, no pad
    assert Tokenizer.load(path, num_sentinels=0).eos_id == 2
    with pytest.raises(DataError, match="pad"):
        Tokenizer.load(path, num_sentinels=10)
