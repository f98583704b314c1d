"""With transformers itself: what `tokenizer_files` writes, `AutoTokenizer` loads offline, with our ids and texts.

Run by `make parity`; needs transformers, not torch.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("data/tokenizers", "interop/huggingface"))

from test_huggingface_model import byte_level, llama_3, unigram, word_piece
from test_tokenizer_files import made, mixed_lines  # noqa: F401 -- made is a fixture

from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.interop.huggingface import tokenizer_files

FAMILIES = ("t5", "mt5", "umt5", "llama", "qwen3", "mistral", "gpt2", "bert")


def loaded_by_transformers(tokenizer: Tokenizer, directory: Path, family: str):
    directory.mkdir(exist_ok=True)
    tokenizer_files.write(tokenizer, directory, family=family, max_length=64)
    (directory / "config.json").write_text(json.dumps({"model_type": "t5" if family == "umt5" else family}))
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def check(t5like_tokenizer: Tokenizer, hf_tokenizer, *, runs: bool) -> None:
    assert len(hf_tokenizer) == t5like_tokenizer.vocab_size
    for line in mixed_lines(1000, runs=runs):
        ids = t5like_tokenizer.encode(line)
        assert hf_tokenizer(line, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ids
        assert hf_tokenizer.decode(ids) == t5like_tokenizer.decode(ids)
        if t5like_tokenizer.num_sentinels:
            ids = t5like_tokenizer.encode_with_sentinels(line)
            assert hf_tokenizer.encode(line, add_special_tokens=False) == ids
            assert hf_tokenizer.decode(ids) == t5like_tokenizer.decode(ids, keep_special=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_tokenizer_trained_by_t5like_is_the_same_in_transformers(made, tmp_path, kind, family):  # noqa: F811
    t5like_tokenizer, hf_tokenizer = made[kind], loaded_by_transformers(made[kind], tmp_path, family)
    check(t5like_tokenizer, hf_tokenizer, runs=True)
    assert (hf_tokenizer.pad_token_id, hf_tokenizer.eos_token_id, hf_tokenizer.unk_token_id) == (0, 1, 2)
    ends = {
        "t5": ([], [1]),
        "mt5": ([], [1]),
        "umt5": ([], [1]),
        "bert": ([int(t5like_tokenizer.sentinel_ids[1])], [1]),
    }
    before, behind = ends.get(family, ([], []))
    assert hf_tokenizer.encode("a text") == [*before, *t5like_tokenizer.encode("a text"), *behind]
    if family == "bert":
        assert (
            hf_tokenizer.mask_token_id == t5like_tokenizer.sentinel_ids[0]
            and hf_tokenizer("a", "b")["token_type_ids"][-1] == 1
        )


@pytest.mark.parametrize(("kind", "family"), [("t5", "t5"), ("llama", "llama"), ("llama", "mistral")])
def test_a_sentencepiece_model_from_elsewhere_is_the_same_in_transformers(made, tmp_path, kind, family):  # noqa: F811
    check(made[kind], loaded_by_transformers(made[kind], tmp_path, family), runs=kind != "t5")


@pytest.mark.parametrize(
    ("kind", "family", "names"),
    [
        (byte_level, "gpt2", {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}),
        (llama_3, "llama", {"eos_token": "<|eot_id|>", "bos_token": "<|begin_of_text|>"}),
        (llama_3, "qwen3", {"eos_token": "<|eot_id|>", "pad_token": "<|endoftext|>"}),
        (unigram, "t5", {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}),
        (word_piece, "bert", {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}),
    ],
)
def test_what_transformers_saved_is_read_and_written_back(tmp_path, kind, family, names):
    source = tmp_path / "source"
    PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(kind().to_str()), **names).save_pretrained(
        source
    )
    t5like_tokenizer = tokenizer_files.read(source)
    hf_tokenizer = loaded_by_transformers(t5like_tokenizer, tmp_path / "out", family)
    for path in source.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert t5like_tokenizer.eos_id == (hf_tokenizer.sep_token_id if family == "bert" else hf_tokenizer.eos_token_id)
    for line in mixed_lines(300, runs=True):
        ids = t5like_tokenizer.encode(line)
        assert hf_tokenizer(line, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ids
        assert hf_tokenizer.decode(ids, clean_up_tokenization_spaces=False) == t5like_tokenizer.decode(ids)


def test_sentencepiece_is_not_needed_by_transformers(made, tmp_path):  # noqa: F811
    loaded_by_transformers(made["unigram"], tmp_path, "t5")
    code = (
        "import sys; sys.modules['sentencepiece'] = None; from transformers import AutoTokenizer; "
        f"print(AutoTokenizer.from_pretrained({str(tmp_path)!r}).encode('a text'))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(output) == [*made["unigram"].encode("a text"), 1]
