"""Run the exported model in the directory of this script. Needs jax and numpy, and sentencepiece for text.

python run.py --prompt="def <extra_id_0>(self):"
python run.py --ids=17,4,1
python run.py --ids=17,4,1 --logits=logits.npy     the logits of `forward`, instead of generating
"""

import argparse
import json
import re
import sys
from pathlib import Path

import jax
import jax.export
import numpy as np


class Model:
    """The programs, weights and tokenizer of a directory that `t5like export --format=stablehlo` wrote."""

    def __init__(self, directory: Path):
        """Read the weights onto jax's default device."""
        self.directory = directory
        self.signature = json.loads((directory / "signature.json").read_text(encoding="utf-8"))
        self.architecture, self.sentinels = self.signature["architecture"], self.signature["tokenizer"]["sentinels"]
        with np.load(directory / "weights.npz", allow_pickle=False) as archive:
            self.weights = {name: jax.numpy.asarray(archive[name]) for name in archive.files}

    def call(self, name: str, *arguments) -> np.ndarray:
        """Run `forward` or `generate` on the arguments that signature.json lists."""
        program = jax.export.deserialize(bytearray((self.directory / f"{name}.jax").read_bytes()))
        return np.asarray(program.call(self.weights, *arguments))

    def generate(self, ids: list[int], prefix: int = 0, seed: int = 0) -> list[int]:
        """The ids generated for a prompt. An encoder returns the prompt's ids, with its masks replaced."""
        if self.architecture == "encoder":
            row, is_token = self.padded(ids, "generate", "ids")
            predicted = self.call("generate", row, is_token, *self.token_types("generate", row))[0]
            mask = self.sentinels["<extra_id_0>"]
            return [int(predicted[i]) if token == mask else token for i, token in enumerate(ids)][1:-1]
        row, _ = self.padded(ids, "generate", "prompt", left=self.architecture == "decoder")
        arguments = self.signature["programs"]["generate"]["arguments"]
        values = {"lengths": np.int32([len(ids)]), "prefix": np.int32([prefix]), "seed": np.uint32(seed)}
        generated = self.call("generate", row, *(values[name] for name in arguments if name != "prompt"))[0].tolist()
        eos_ids = self.signature["tokenizer"]["eos_ids"]
        return generated[: next((i for i, token in enumerate(generated) if token in eos_ids), len(generated))]

    def forward(self, ids: list[int], prefix: int = 0) -> np.ndarray:
        """Logits [L, V] at each id.

        For an encoder-decoder the ids are the encoder's input, and the logits those of the first generated token.
        """
        if self.architecture == "encoder_decoder":
            inputs = self.padded(ids, "forward", "inputs")
            return self.call(
                "forward", *inputs, *self.padded([self.signature["tokenizer"]["decoder_start_id"]], "forward", "ids")
            )[0, :1]
        row, is_token = self.padded(ids, "forward", "ids")
        others = self.token_types("forward", row)
        if self.architecture == "decoder":
            others = [(np.arange(row.shape[1]) < prefix).astype(np.int32)[None]]
        return self.call("forward", row, is_token, *others)[0, : len(ids)]

    def token_types(self, name: str, row: np.ndarray) -> list[np.ndarray]:
        """The token types of a model trained on pairs of texts: all tokens belong to the first text."""
        return [np.zeros_like(row)] if "token_types" in self.signature["programs"][name]["arguments"] else []

    def padded(self, ids: list[int], name: str, argument: str, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """One row of ids, padded to the argument's length, and a mask of the ids without padding."""
        length = int(self.signature["programs"][name]["arguments"][argument][1][1])
        if not 0 < len(ids) <= length:
            raise SystemExit(f"run.py: {len(ids)} tokens, but the exported program accepts 1 to {length}")
        padding, ones = [0] * (length - len(ids)), [1] * len(ids)
        row, mask = (padding + ids, padding + ones) if left else (ids + padding, ones + padding)
        return np.array([row], np.int32), np.array([mask], np.int32)

    def tokenizer(self):
        """The SentencePiece model."""
        if not self.signature["tokenizer"]["sentencepiece"]:
            raise SystemExit("run.py: this model has no SentencePiece tokenizer; use --ids")
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=(self.directory / "tokenizer.model").read_bytes())

    def encode(self, text: str) -> tuple[list[int], int]:
        """A text in the model's prompt format, and how many of its ids attend to each other in both directions.

        The rules are those of t5like's `PromptFormat.prompt`; signature.json holds the format.
        """
        model, form = self.tokenizer(), self.signature["prompt_format"]
        if form["turns"]:
            frame, turns = form["plain"], [model.encode(turn.replace("\0", text)) for turn in form["turns"]]
            ids = [token for turn in turns for token in (*turn, form["eos_id"])]
        else:
            mode = text[:3] if text[:3] in form["modes"] else None
            if mode:
                frame, text = form["modes"][mode], text[3:].removeprefix(" ")
            else:
                frame = form["infilling"] if "<extra_id_" in text else form["plain"]
            ids = []
            for part in re.split(r"(<extra_id_\d+>)", text):
                ids += [self.sentinels[part]] if part in self.sentinels else model.encode(part)
        ids = [*frame["before"], *ids, *frame["after"]] or [form["eos_id"]]
        return [*ids, *frame["start"]], len(ids) if frame["bidirectional"] else 0

    def decode(self, ids: list[int]) -> str:
        """Ids as text, sentinels by their names."""
        model, names = self.tokenizer(), {token: name for name, token in self.sentinels.items()}
        text, plain = "", []
        for token in [*ids, None]:
            if token is not None and token not in names:
                plain.append(token)
                continue
            part = model.decode(plain)
            if text and plain and model.id_to_piece(plain[0])[0] == "\u2581" and part[:1] != " ":
                part = " " + part  # some models omit it at the beginning of a text
            text, plain = text + part + names.get(token, ""), []
        return text


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser()
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt")
    source.add_argument("--ids", help="token ids of a prompt in the model's format, separated by commas")
    parser.add_argument(
        "--prefix", type=int, default=0, help="with --ids: how many of them attend to each other in both directions"
    )
    parser.add_argument("--seed", type=int, default=0, help="of programs that sample")
    parser.add_argument("--logits", metavar="FILE", help="write forward's logits there instead of generating")
    options = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # the terminal's encoding may lack a character
    model = Model(Path(__file__).resolve().parent)
    if options.ids is None:
        ids, prefix = model.encode(options.prompt)
    else:
        ids, prefix = [int(token) for token in options.ids.split(",")], options.prefix
    if options.logits:
        np.save(options.logits, model.forward(ids, prefix))
        return
    generated = model.generate(ids, prefix, options.seed)
    print(model.decode(generated) if options.ids is None else ",".join(map(str, generated)))


if __name__ == "__main__":
    main()
