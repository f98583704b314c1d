"""Labels as numbers of a token store, where they have the place of a supervised example's target.

    objective              numbers of the label, all below the size of the vocabulary
    classification         the label's index
    regression             the 4 bytes of the number's float32, the highest first
    token_classification   for each token of the text: 1 + the index of the word's label at the first token of a word, 0
                           at its other tokens

A word's label is predicted at its first token, as in BERT (Devlin et al. 2019, section 5.3). Called by `shards`;
`supervised.labelled` reads the numbers.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # the pipeline imports this module, and has to be importable without sentencepiece
    from t5like.data.sources.templates import Part
    from t5like.data.tokenizers.tokenizer import Tokenizer

NUMBER_BYTES = 4


def encode_examples(objective: str, tokenizer: "Tokenizer", parts: Sequence["Part"]) -> list[np.ndarray]:
    """The numbers of each part of some examples (`sources.labels.Labelled`), int32: token ids, or those of a label."""
    if objective == "token_classification":
        encoded = []
        for text, labels in zip(parts[::2], parts[1::2], strict=True):
            ids_T, word_T = encode_words(tokenizer, text.text.split())
            label_W = np.array([0, *(int(label) + 1 for label in labels.text.split())], np.int32)
            encoded += [ids_T, label_W[word_T]]
        return encoded
    texts = iter(tokenizer.encode_batch([part.text for part in parts if not part.is_target]))
    encode_label = _number if objective == "regression" else lambda text: np.array([int(text)], np.int32)
    return [encode_label(part.text) if part.is_target else next(texts) for part in parts]


def encode_words(tokenizer: "Tokenizer", words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Words as tokens: ids, and at the first token of each word its number from 1, 0 at the others; int32 [T] each.

    Words are tokenized one by one. All but the first begin with a space, unless the tokenizer puts one in front of
    every text. A word of characters that the tokenizer drops has no token.
    """
    one, two = tokenizer.encode_batch(["a", "a a"])
    space = "" if two.tolist() == 2 * one.tolist() else " "
    ids = tokenizer.encode_batch([space * (number > 0) + word for number, word in enumerate(words)])
    numbers = [(np.arange(len(each)) == 0) * (number + 1) for number, each in enumerate(ids)]
    return tuple(np.concatenate([np.empty(0), *each]).astype(np.int32) for each in (ids, numbers))


def decode_numbers(bytes_N4: np.ndarray) -> np.ndarray:
    """float32 [N] of the four bytes of each, any integers."""
    return bytes_N4.astype(np.uint8).view(">f4")[:, 0].astype(np.float32)


def _number(text: str) -> np.ndarray:
    return np.frombuffer(np.array(float(text), ">f4").tobytes(), np.uint8).astype(np.int32)
