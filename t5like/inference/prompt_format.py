"""How a text becomes the prompt of a model: the same tokens around it that the training objectives put there.

`PromptFormat.of` is the only place that decides this. `generate`, `loglikelihood`, `evaluation` and `interop.stablehlo`
use it. The format is made of plain values, so that an exported program can carry it in a JSON file.
"""

import dataclasses
from typing import Any, NamedTuple

from t5like.config.schema import Config
from t5like.data.objectives.denoising import MODES
from t5like.data.objectives.masking import CLS
from t5like.data.sources.templates import render_prompt
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.data.tokenizers.vocabulary import DECODER_START_ID
from t5like.errors import ConfigError

TEXT = "\0"  # stands for the text in `PromptFormat.turns`
SENTINEL_PREFIX = "<extra_id_"


class Prompt(NamedTuple):
    """A prompt in token ids.

    Attributes:
        ids: the encoder's input, or the tokens that a decoder-only model continues.
        prefix: how many of a decoder-only model's ids attend to each other in both directions.
    """

    ids: list[int]
    prefix: int = 0


@dataclasses.dataclass(frozen=True)
class Frame:
    """The ids around the ids of a text.

    Attributes:
        before: ids in front of the text.
        after: ids behind the text.
        start: ids at the end of the prompt that are never part of the bidirectional prefix: the decoder's start token.
        bidirectional: whether all ids but `start` attend to each other in both directions (decoder-only models).
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    start: tuple[int, ...] = ()
    bidirectional: bool = False


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """The prompt format of one model.

    Attributes:
        plain: the frame of a text that has no sentinel and no mode token.
        infilling: the frame of a text with sentinels (<extra_id_N>), and of the input of a supervised example.
        modes: the frame of a text that begins with one of UL2's mode tokens, by the token's name ("[S]").
        turns: of a model trained on conversations: the turns before the answer, with `TEXT` in place of the text. Each
            is encoded as plain text and followed by EOS. Empty: the text is encoded with its sentinels.
        eos_id: the prompt of an empty text that has no frame.
        reads_text: False for an encoder-decoder trained on causal_lm alone, whose encoder only reads EOS.
    """

    plain: Frame
    infilling: Frame
    modes: dict[str, Frame]
    turns: tuple[str, ...]
    eos_id: int
    reads_text: bool

    @classmethod
    def of(cls, config: Config, tokenizer: Tokenizer) -> "PromptFormat":
        """The format of a model.

        With `data.messages_field` the text is a user's turn. In span corruption, UL2 and supervised rows it is an input
        that ends with EOS. Causal and prefix LM continue the text; where a model was trained on both, that is the
        format of plain text.
        """
        objectives, eos = set(config.data.objective), tokenizer.eos_id
        decoder = config.model.architecture == "decoder"
        start = (DECODER_START_ID,) if decoder else ()
        if config.data.messages_field:
            turns, frame = tuple(render_prompt([{"role": "user", "content": TEXT}])), Frame(before=start)
            return cls(frame, frame, {}, turns, eos, reads_text=True)
        if config.model.architecture == "encoder":
            frame = Frame(before=(int(tokenizer.sentinel_ids[CLS]),), after=(eos,))
            return cls(frame, frame, {}, (), eos, reads_text=True)
        bos = () if tokenizer.bos_id is None else (tokenizer.bos_id,)  # as imported models were trained
        continued = Frame(before=bos, bidirectional=decoder and "prefix_lm" in objectives)
        answered = Frame(after=(eos,), start=start, bidirectional=decoder)
        has_inputs = bool(objectives & {"span_corruption", "ul2", "supervised"})
        continues = not has_inputs or objectives & {"prefix_lm", *(["causal_lm"] if decoder else [])}
        modes = {}
        for number, mode in enumerate(MODES if "ul2" in objectives else ()):
            before = (int(tokenizer.sentinel_ids[-1 - number]),)
            after = () if mode == "S" else (eos,)  # the input of the S-denoiser is continued, so that it has no end
            modes[f"[{mode}]"] = Frame(before, after, start, bidirectional=decoder)
        return cls(
            plain=continued if continues else answered,
            infilling=answered if has_inputs else continued,
            modes=modes,
            turns=(),
            eos_id=eos,
            reads_text=decoder or objectives != {"causal_lm"},
        )

    @property
    def continues_text(self) -> bool:
        """Whether the model continues a plain text, rather than answering it."""
        return not (self.turns or self.plain.after or self.plain.start)

    def prompt(self, text: str, tokenizer: Tokenizer) -> Prompt:
        """A text as a prompt.

        Raises:
            ConfigError: the model's encoder reads no text, but there is one.
        """
        mode = text[:3] if text[:3] in self.modes else None
        if mode:
            frame, text = self.modes[mode], text[3:].removeprefix(" ")
        else:
            frame = self.infilling if SENTINEL_PREFIX in text else self.plain
        ids = self._encode(text, tokenizer)
        if ids and not self.reads_text:
            raise ConfigError(
                "--prompt: this encoder-decoder was trained on causal_lm alone, whose encoder reads no text; "
                "use --prompt=''"
            )
        return self._framed(frame, ids)

    def input_prompt(self, input_ids: list[int]) -> Prompt:
        """The prompt of a supervised example whose input ids, EOS included, are those of the token store."""
        return self._framed(dataclasses.replace(self.infilling, after=()), input_ids)

    def to_values(self) -> dict[str, Any]:
        """The format as plain values (numbers, strings, lists, dicts), for JSON."""
        return dataclasses.asdict(self)

    def _encode(self, text: str, tokenizer: Tokenizer) -> list[int]:
        if not self.turns:
            return tokenizer.encode_with_sentinels(text)
        return [token for turn in self.turns for token in (*tokenizer.encode(turn.replace(TEXT, text)), self.eos_id)]

    def _framed(self, frame: Frame, ids: list[int]) -> Prompt:
        ids = [*frame.before, *ids, *frame.after] or [self.eos_id]
        return Prompt([*ids, *frame.start], len(ids) if frame.bidirectional else 0)
