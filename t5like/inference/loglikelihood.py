"""How likely a model of any shape finds a text: in what context, in how many windows; and how it would go on.

`harness` asks through it, for public benchmarks; nothing here knows those. A pair is a context and a continuation:

* decoder: the text goes on, or stands behind EOS and START, as `Generator.prompt` shows the objectives;
* encoder-decoder: the encoder reads the context, the decoder says the continuation. One that has learned `causal_lm`
  alone reads the context in its decoder;
* encoder: the pseudo-log-likelihood of Salazar et al. 2020 (arXiv:1910.14659, section 2): each token of the
  continuation is masked in turn, and all else is seen.

Contexts are cut from the left to the lengths of training, and counted. Rows go to the device in fixed shapes, `ROWS` at
a time and a power of two long, so that few programs are compiled. Where context and continuation part, and how a long
text becomes windows, is as in lm-evaluation-harness (`TemplateLM._encode_pair`, `utils.get_rolling_token_windows`).
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from t5like.config.schema import Config
from t5like.data.objectives.masking import CLS, MASK
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.data.tokenizers.vocabulary import DECODER_START_ID
from t5like.errors import ConfigError
from t5like.inference.generate import BUCKET, Generator, Prompt, until
from t5like.inference.target_scores import SCORING_ROWS, score_targets, scoring_batch
from t5like.types import Batch, Tree

CONTINUATION = 256  # tokens that are generated at most where a task doesn't say


class Case(NamedTuple):
    """What is read, and what is scored.

    Attributes:
        prompt: of an encoder-only model: the context's ids.
        answer: ids.
        read: how many of the answer's first ids are only read.
    """

    prompt: Prompt
    answer: list[int]
    read: int = 0


class Likelihood(NamedTuple):
    """Of a continuation: log p in nats, and whether greedy decoding says it."""

    log_p: float
    greedy: bool


class MaskedRow(NamedTuple):
    """An encoder's row with one masked token."""

    ids: list[int]
    place: int
    truth: int


class Likelihoods:
    """Scores and continues texts with one model.

    Attributes:
        length: ids that a row's context may take: of a decoder-only model with the continuation.
        requests, cut, cut_tokens: how many contexts there were, how many of them were cut, and by how many tokens.
        shortened: how many texts were generated with fewer tokens than were asked for.
    """

    def __init__(
        self, config: Config, mesh: jax.sharding.Mesh, params: Tree, tokenizer: Tokenizer,
        progress: Callable[[str, int, int], None] = lambda what, done, count: None,
    ):  # fmt: skip
        """`config` is settled on `mesh`; `progress` hears how many rows of how many are done."""
        self.config, self.mesh, self.params, self.tokenizer = config, mesh, params, tokenizer
        self.progress, self.generator = progress, Generator(config, params, tokenizer)
        self.requests = self.cut = self.cut_tokens = self.shortened = 0
        shape, objectives = config.model.architecture, set(config.data.objective)
        self.encoder, self.decoder = shape == "encoder", shape == "decoder"
        self.length = config.row_length if self.decoder else config.data.inputs_length
        self._in_decoder = shape == "encoder_decoder" and objectives == {"causal_lm"}
        if self._in_decoder:
            self.length = config.data.targets_length
        # Whether a text goes on as it is, or stands before an answer.
        self._goes_on = (
            self.encoder
            or self._in_decoder
            or self.generator.prompt("a").ids
            in (
                tokenizer.encode("a"),
                [tokenizer.bos_id, *tokenizer.encode("a")],
            )
        )
        self._prefix = "prefix_lm" in objectives

    # ---- What is asked ----

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Of each continuation, given its context, which may be empty.

        Raises:
            ConfigError: a continuation is longer than the model's learned positions.
        """
        return self.score([self._counted(self.case(*pair)) for pair in pairs])

    def texts(self, texts: Sequence[str]) -> list[float]:
        """log p of whole texts, of any length, in windows; every token is predicted once."""
        cases = [(number, case) for number, text in enumerate(texts) for case in self.windows(text)]
        total = [0.0] * len(texts)
        for (number, _), found in zip(cases, self.score([case for _, case in cases]), strict=True):
            total[number] += found.log_p
        return total

    def continuations(
        self, contexts: Sequence[str], *, most: int = CONTINUATION, stop: Sequence[str] = (), temperature: float = 0.0
    ) -> list[str]:
        """What the model says to each context, at most so many tokens, up to EOS or the first of the stop texts.

        Raises:
            ConfigError: the model has no decoder; or `Generator.prompt` refuses.
        """
        if self.encoder:
            raise ConfigError(
                "model.architecture=encoder can't generate text; use tasks of log-likelihood, such as multiple choice"
            )
        if self._in_decoder:
            raise ConfigError(
                "data.objective=causal_lm alone leaves this encoder-decoder nothing to read a context with; use tasks "
                "of log-likelihood, or a model that has learned prefix_lm"
            )
        room, asked, limit = self.length, most, self.config.model.longest_text
        most = min(most, limit - room // 2 if self.decoder else limit)
        if self.decoder:
            room = max(room + 1 - most, room // 2)
        prompts = [self.fit(self.generator.prompt(context), room) for context in contexts]
        self.shortened += len(contexts) * (most < asked)
        groups = defaultdict(list)
        for number, prompt in enumerate(prompts):
            groups[bucket(len(prompt.ids))].append(number)
        said: dict[int, str] = {}
        for width, numbers in sorted(groups.items()):
            for begin in range(0, len(numbers), SCORING_ROWS):
                some = numbers[begin : begin + SCORING_ROWS]
                filled = [prompts[number] for number in some + some[:1] * (SCORING_ROWS - len(some))]
                how = {"temperature": temperature, "seed": self.config.seed + len(said)}
                with jax.set_mesh(self.mesh):
                    ids = self.generator.ids(filled, max_new_tokens=most, width=width, **how)
                said |= zip(some, self.generator.texts(ids[: len(some)]), strict=True)
                self.progress("texts", len(said), len(prompts))
        return [until(said[number], stop) for number in range(len(prompts))]

    # ---- What the model reads ----

    def case(self, context: str, continuation: str) -> Case:
        """A pair in ids. Spaces that end the context belong to the continuation: pieces begin with them.

        A text that goes on is encoded in one piece and cut where the context's own ids end; else each for itself.
        """
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        if not self._goes_on:
            return Case(self.generator.prompt(context), self.tokenizer.encode(continuation))
        before = self.tokenizer.encode(context) if context else []
        after = self.tokenizer.encode(context + continuation)[len(before) :]
        if self.decoder and before and self.tokenizer.bos_id is not None:  # as `Generator.prompt` begins
            before = [self.tokenizer.bos_id, *before]
        return self._going_on(before, after)

    def windows(self, text: str) -> list[Case]:
        """A text in parts as long as a row, each but the first behind as much of the text before it as has room.

        length 4    tokens A B C D E F    EOS A B C -> A B C D    B C D E -> E F (D -> E, E -> F; B C are only read)
        """
        ids, data = self.tokenizer.encode(text), self.config.data
        size = self.length - 2 if self.encoder else self.length if self.decoder else data.targets_length
        overhead = 0 if self._goes_on else 2  # EOS, START
        size = max(size - overhead * self.decoder, 1)
        found = []
        for begin in range(0, len(ids), size):
            end = min(begin + size, len(ids))
            if self.encoder or self._in_decoder:
                first = end - size
            elif self.decoder:
                first = end - size - 1
            else:
                first = begin - data.inputs_length + overhead
            before = ids[max(first, 0) : begin]
            if self._goes_on:
                found.append(self._going_on(before, ids[begin:end]))
            else:
                prompt = self.generator.prompt(self.tokenizer.decode(before))
                found.append(Case(self.fit(prompt, self.length, count=False), ids[begin:end]))
        return found

    def _going_on(self, before: list[int], after: list[int]) -> Case:
        eos = self.tokenizer.eos_id
        if self.encoder:
            return Case(Prompt(before), after)
        if self._in_decoder:
            return Case(Prompt([eos]), before + after, len(before))
        # What begins a text: the family's own token, or EOS, which stands between documents.
        before = before or [eos if self.tokenizer.bos_id is None else self.tokenizer.bos_id]
        return Case(Prompt(before, len(before) if self.decoder and self._prefix else 0), after)

    def fit(self, prompt: Prompt, room: int, *, count: bool = True) -> Prompt:
        """Cut a prompt from the left to so many ids; START or a mode token at its beginning stays."""
        self.requests += count
        more = len(prompt.ids) - max(room, 0 if self.encoder else 2)
        if more <= 0:
            return prompt
        self.cut += count
        self.cut_tokens += more * count
        keep = int(
            not self.encoder
            and prompt.ids[0] in {DECODER_START_ID, self.tokenizer.bos_id, *self.tokenizer.sentinel_ids.tolist()}
        )
        return Prompt(prompt.ids[:keep] + prompt.ids[keep + more :], max(prompt.prefix - more, 0))

    def _counted(self, case: Case) -> Case:
        """A case whose context is cut to what the continuation leaves."""
        own = len(case.answer) - case.read
        if self._in_decoder:
            kept = self.fit(Prompt(case.answer[: case.read]), max(self.length - own, 2)).ids
            return Case(case.prompt, kept + case.answer[case.read :], len(kept))
        room = self.length
        if self.encoder:
            room -= 2 + own
        elif self.decoder:
            room -= own - 1
        return case._replace(prompt=self.fit(case.prompt, room))

    # ---- On the device ----

    def score(self, cases: Sequence[Case]) -> list[Likelihood]:
        """Each case's rows, grouped by shape; a case without an answer is certain."""
        groups: dict[tuple[int, int], list[tuple[int, Case | MaskedRow]]] = defaultdict(list)
        for number, case in enumerate(cases):
            for row in self._rows(case):
                groups[self._shape(row)].append((number, row))
        log_p, greedy = np.zeros(len(cases)), np.ones(len(cases), bool)
        done, count = 0, sum(map(len, groups.values()))
        for shape, rows in sorted(groups.items()):
            for begin in range(0, len(rows), SCORING_ROWS):
                some = rows[begin : begin + SCORING_ROWS]
                batch = self._batch([row for _, row in some + some[:1] * (SCORING_ROWS - len(some))], *shape)
                with jax.set_mesh(self.mesh):
                    found = jax.device_get(score_targets(self.config, self.params, batch))
                numbers = [number for number, _ in some]
                np.subtract.at(log_p, numbers, found.nats_B[: len(some)].astype(float))
                np.logical_and.at(greedy, numbers, found.greedy_B[: len(some)])
                done += len(some)
                self.progress("rows", done, count)
        return [Likelihood(*pair) for pair in zip(log_p.tolist(), greedy.tolist(), strict=True)]

    def _rows(self, case: Case) -> list[Case] | list[MaskedRow]:
        if self.encoder:
            marks = (int(self.tokenizer.sentinel_ids[number]) for number in (MASK, CLS))
            rows = masked_rows(case, *marks, self.tokenizer.eos_id)
        else:
            rows = [case] if len(case.answer) > case.read else []
        if rows and max(self._places(rows[0])) > self.config.model.longest_text:
            raise ConfigError(
                f"a continuation of {len(case.answer) - case.read} tokens does not fit "
                f"model.max_length={self.config.model.max_length}; use tasks with shorter ones"
            )
        return rows

    def _places(self, row: Case | MaskedRow) -> tuple[int, int]:
        """How many ids a row takes of the encoder (or the only stack), and of a decoder behind it."""
        if isinstance(row, MaskedRow):
            return len(row.ids), 0
        if self.decoder:
            return len(row.prompt.ids) + len(row.answer) - 1, 0
        return len(row.prompt.ids), len(row.answer)

    def _shape(self, row: Case | MaskedRow) -> tuple[int, int]:
        width, longest = self._places(row)
        return bucket(width), longest and bucket(longest)

    def _batch(self, rows: Sequence[Case | MaskedRow], width: int, longest: int) -> Batch:
        if self.encoder:
            return masked_batch(rows, width)
        batch = scoring_batch(self.config, [(row.prompt, row.answer) for row in rows], width, longest)
        if self._in_decoder:
            for weights_L, row in zip(batch.weights_BL, rows, strict=True):
                weights_L[: row.read] = 0
        return batch


def masked_rows(case: Case, mask: int, cls: int, sep: int) -> list[MaskedRow]:
    """A row for each token of the answer.

    context A B, answer C D    CLS A B MASK D SEP -> C    CLS A B C MASK SEP -> D
    """
    row = [cls, *case.prompt.ids, *case.answer, sep]
    first = 1 + len(case.prompt.ids)
    return [
        MaskedRow([*row[:place], mask, *row[place + 1 :]], place, row[place])
        for place in range(first, first + len(case.answer))
    ]


def masked_batch(rows: Sequence[MaskedRow], width: int) -> Batch:
    """Masked rows, padded to `width`."""
    ids_BS, targets_BS, segments_BS = (np.zeros((len(rows), width), np.int32) for _ in range(3))
    weights_BS = np.zeros(ids_BS.shape, np.float32)
    for number, row in enumerate(rows):
        ids_BS[number, : len(row.ids)] = row.ids
        segments_BS[number, : len(row.ids)] = 1
        targets_BS[number, row.place], weights_BS[number, row.place] = row.truth, 1
    return Batch(None, targets_BS, weights_BS, ids_BS, segments_BS)


def bucket(length: int) -> int:
    """The next power of two, at least `BUCKET`."""
    return max(BUCKET, 1 << max(length - 1, 0).bit_length())
