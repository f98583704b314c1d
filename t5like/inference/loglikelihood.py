"""Log-likelihoods of texts under a model of any architecture, and text generated after a context.

Used by `evaluation.lm_eval` for public benchmarks; nothing here depends on them. A pair is a context and its
continuation:

* decoder: the continuation follows the context, or EOS and the start token, by `PromptFormat`;
* encoder-decoder: the context is the encoder's input, the continuation the decoder's targets. A model trained on
  `causal_lm` alone has the context in its decoder;
* encoder: the pseudo-log-likelihood of Salazar et al. 2020 (arXiv:1910.14659, section 2): each token of the
  continuation is masked in a row of its own, and all other tokens are visible.

Contexts are truncated from the left to the lengths of training, and counted. Batches have fixed shapes, `SCORING_ROWS`
rows and a power of two as length, so that few programs are compiled. The boundary between context and continuation,
and the windows of a long text, are those of lm-evaluation-harness (`TemplateLM._encode_pair`,
`utils.get_rolling_token_windows`).
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
from t5like.inference.generate import BUCKET, Generator, truncate_at_stop
from t5like.inference.prompt_format import Prompt
from t5like.inference.target_scores import SCORING_ROWS, score_targets, scoring_batch
from t5like.types import Batch, Tree

MAX_NEW_TOKENS = 256  # of generated texts, where a task does not set it


class ScoringExample(NamedTuple):
    """A prompt and the continuation that is scored.

    Attributes:
        prompt: of an encoder-only model: the context's ids.
        continuation: ids.
        context: how many of the continuation's first ids are context, which is not scored.
    """

    prompt: Prompt
    continuation: list[int]
    context: int = 0


class TextScore(NamedTuple):
    """The score of a continuation: log p in nats, and whether greedy decoding generates it."""

    log_p: float
    greedy: bool


class MaskedRow(NamedTuple):
    """An encoder's row with one masked token: the row's ids, the index of the mask, the token there."""

    ids: list[int]
    index: int
    target: int


class LoglikelihoodScorer:
    """Scores and continues texts with one model.

    Attributes:
        length: ids that the context may have in a row; for a decoder-only model, context and continuation.
        num_contexts, num_truncated, truncated_tokens: number of contexts, of truncated ones, and of tokens cut off.
        num_shortened: texts that were generated with fewer tokens than requested.
    """

    def __init__(
        self, config: Config, mesh: jax.sharding.Mesh, params: Tree, tokenizer: Tokenizer,
        progress: Callable[[str, int, int], None] = lambda unit, done, total: None,
    ):  # fmt: skip
        """`config` is resolved for `mesh`; `progress` is called with a unit, the number done and the total."""
        self.config, self.mesh, self.params, self.tokenizer = config, mesh, params, tokenizer
        self.progress, self.generator = progress, Generator(config, params, tokenizer)
        self.format = self.generator.prompt_format
        self.num_contexts = self.num_truncated = self.truncated_tokens = self.num_shortened = 0
        architecture = config.model.architecture
        self.encoder, self.decoder = architecture == "encoder", architecture == "decoder"
        self.length = config.row_length if self.decoder else config.data.inputs_length
        self._context_in_decoder = not self.format.reads_text
        if self._context_in_decoder:
            self.length = config.data.targets_length
        self._continues_text = self.encoder or self.format.continues_text

    # ---- Requests ----

    def score_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[TextScore]:
        """The score of each continuation, given its context, which may be empty.

        Raises:
            ConfigError: a continuation is longer than the model's learned positions.
        """
        return self.score([self._truncated(self.example_of(*pair)) for pair in pairs])

    def score_texts(self, texts: Sequence[str]) -> list[float]:
        """log p of full texts of any length, in windows; every token is predicted once."""
        numbers, examples = [], []
        for number, text in enumerate(texts):
            for example in self.windows(text):
                numbers.append(number)
                examples.append(example)
        total = [0.0] * len(texts)
        for number, score in zip(numbers, self.score(examples), strict=True):
            total[number] += score.log_p
        return total

    def generate(
        self,
        contexts: Sequence[str],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
    ) -> list[str]:
        """The text that the model generates after each context, up to EOS or the first stop text.

        Raises:
            ConfigError: the model has no decoder; or the prompt format refuses a context.
        """
        self._check_generates()
        context_length, limit = self.length, self.config.model.longest_text
        new_tokens = min(max_new_tokens, limit - context_length // 2 if self.decoder else limit)
        if self.decoder:
            context_length = max(context_length + 1 - new_tokens, context_length // 2)
        prompts = [self.truncate(self.generator.prompt(context), context_length) for context in contexts]
        self.num_shortened += len(contexts) * (new_tokens < max_new_tokens)
        groups = defaultdict(list)
        for number, prompt in enumerate(prompts):
            groups[bucket(len(prompt.ids))].append(number)
        texts: dict[int, str] = {}
        for width, numbers in sorted(groups.items()):
            for begin in range(0, len(numbers), SCORING_ROWS):
                batch = numbers[begin : begin + SCORING_ROWS]
                padded = [prompts[number] for number in batch + batch[:1] * (SCORING_ROWS - len(batch))]
                sampling = {"temperature": temperature, "seed": self.config.seed + len(texts)}
                with jax.set_mesh(self.mesh):
                    ids = self.generator.ids(padded, max_new_tokens=new_tokens, width=width, **sampling)
                texts |= zip(batch, self.generator.texts(ids[: len(batch)]), strict=True)
                self.progress("texts", len(texts), len(prompts))
        return [truncate_at_stop(texts[number], stop) for number in range(len(prompts))]

    def _check_generates(self) -> None:
        if self.encoder:
            raise ConfigError(
                "model.architecture=encoder can't generate text; use tasks of log-likelihood, such as multiple choice"
            )
        if self._context_in_decoder:
            raise ConfigError(
                "data.objective=causal_lm alone gives this encoder-decoder no encoder input for a context; use tasks "
                "of log-likelihood, or a model trained on prefix_lm"
            )

    # ---- Model inputs ----

    def example_of(self, context: str, continuation: str) -> ScoringExample:
        """A pair in ids. Spaces at the end of the context are moved to the continuation: tokens begin with them.

        Where the model continues a text, context and continuation are encoded together and split where the context's
        own ids end; else each is encoded separately.
        """
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        if not self._continues_text:
            return ScoringExample(self.generator.prompt(context), self.tokenizer.encode(continuation))
        before = self.tokenizer.encode(context) if context else []
        after = self.tokenizer.encode(context + continuation)[len(before) :]
        if self.decoder and before:
            before = [*self.format.plain.before, *before]
        return self._continued(before, after)

    def windows(self, text: str) -> list[ScoringExample]:
        """A text in parts as long as a row. Each part but the first has as much preceding text as its row can hold.

        length 4    tokens A B C D E F    EOS A B C -> A B C D    B C D E -> E F (D -> E, E -> F; B C are context)
        """
        ids, data = self.tokenizer.encode(text), self.config.data
        size = self.length - 2 if self.encoder else self.length if self.decoder else data.targets_length
        overhead = 0 if self._continues_text else 2  # EOS, start token
        size = max(size - overhead * self.decoder, 1)
        examples = []
        for begin in range(0, len(ids), size):
            end = min(begin + size, len(ids))
            if self.encoder or self._context_in_decoder:
                first = end - size
            elif self.decoder:
                first = end - size - 1
            else:
                first = begin - data.inputs_length + overhead
            before = ids[max(first, 0) : begin]
            if self._continues_text:
                examples.append(self._continued(before, ids[begin:end]))
            else:
                prompt = self.generator.prompt(self.tokenizer.decode(before))
                examples.append(ScoringExample(self.truncate(prompt, self.length, count=False), ids[begin:end]))
        return examples

    def _continued(self, before: list[int], after: list[int]) -> ScoringExample:
        eos = self.tokenizer.eos_id
        if self.encoder:
            return ScoringExample(Prompt(before), after)
        if self._context_in_decoder:
            return ScoringExample(Prompt([eos]), before + after, len(before))
        # A text begins with the family's own token, or with EOS, which separates documents.
        before = before or [eos if self.tokenizer.bos_id is None else self.tokenizer.bos_id]
        return ScoringExample(Prompt(before, len(before) if self.format.plain.bidirectional else 0), after)

    def truncate(self, prompt: Prompt, length: int, *, count: bool = True) -> Prompt:
        """Cut a prompt from the left to `length` ids; a start or mode token at its beginning stays."""
        self.num_contexts += count
        excess = len(prompt.ids) - max(length, 0 if self.encoder else 2)
        if excess <= 0:
            return prompt
        self.num_truncated += count
        self.truncated_tokens += excess * count
        keep = int(
            not self.encoder
            and prompt.ids[0] in {DECODER_START_ID, self.tokenizer.bos_id, *self.tokenizer.sentinel_ids.tolist()}
        )
        return Prompt(prompt.ids[:keep] + prompt.ids[keep + excess :], max(prompt.prefix - excess, 0))

    def _truncated(self, example: ScoringExample) -> ScoringExample:
        """An example whose context is truncated to the length that the continuation leaves."""
        scored = len(example.continuation) - example.context
        if self._context_in_decoder:
            context = Prompt(example.continuation[: example.context])
            kept = self.truncate(context, max(self.length - scored, 2)).ids
            return ScoringExample(example.prompt, kept + example.continuation[example.context :], len(kept))
        length = self.length
        if self.encoder:
            length -= 2 + scored
        elif self.decoder:
            length -= scored - 1
        return example._replace(prompt=self.truncate(example.prompt, length))

    # ---- On the device ----

    def score(self, examples: Sequence[ScoringExample]) -> list[TextScore]:
        """The score of each example, in batches of rows of one shape. An empty continuation has probability 1."""
        groups: dict[tuple[int, int], list[tuple[int, ScoringExample | MaskedRow]]] = defaultdict(list)
        for number, example in enumerate(examples):
            for row in self._rows(example):
                groups[self._shape(row)].append((number, row))
        log_p, greedy = np.zeros(len(examples)), np.ones(len(examples), bool)
        done, total = 0, sum(map(len, groups.values()))
        for shape, rows in sorted(groups.items()):
            for begin in range(0, len(rows), SCORING_ROWS):
                part = rows[begin : begin + SCORING_ROWS]
                batch = self._batch([row for _, row in part + part[:1] * (SCORING_ROWS - len(part))], *shape)
                with jax.set_mesh(self.mesh):
                    scores = jax.device_get(score_targets(self.config.of_model(), self.params, batch))
                numbers = [number for number, _ in part]
                np.subtract.at(log_p, numbers, scores.nats_B[: len(part)].astype(float))
                np.logical_and.at(greedy, numbers, scores.greedy_B[: len(part)])
                done += len(part)
                self.progress("rows", done, total)
        return [TextScore(*pair) for pair in zip(log_p.tolist(), greedy.tolist(), strict=True)]

    def _rows(self, example: ScoringExample) -> list[ScoringExample] | list[MaskedRow]:
        if self.encoder:
            mask, cls = (int(self.tokenizer.sentinel_ids[number]) for number in (MASK, CLS))
            rows = masked_rows(example, mask, cls, self.tokenizer.eos_id)
        else:
            rows = [example] if len(example.continuation) > example.context else []
        if rows and max(self._lengths(rows[0])) > self.config.model.longest_text:
            raise ConfigError(
                f"a continuation of {len(example.continuation) - example.context} tokens does not fit "
                f"model.max_length={self.config.model.max_length}; use tasks with shorter ones"
            )
        return rows

    def _lengths(self, row: ScoringExample | MaskedRow) -> tuple[int, int]:
        """Number of ids of a row in the encoder (or the only stack), and in the decoder of an encoder-decoder."""
        if isinstance(row, MaskedRow):
            return len(row.ids), 0
        if self.decoder:
            return len(row.prompt.ids) + len(row.continuation) - 1, 0
        return len(row.prompt.ids), len(row.continuation)

    def _shape(self, row: ScoringExample | MaskedRow) -> tuple[int, int]:
        prompt_length, target_length = self._lengths(row)
        return bucket(prompt_length), target_length and bucket(target_length)

    def _batch(self, rows: Sequence[ScoringExample | MaskedRow], prompt_length: int, target_length: int) -> Batch:
        if self.encoder:
            return masked_batch(rows, prompt_length)
        pairs = [(row.prompt, row.continuation) for row in rows]
        batch = scoring_batch(self.config, pairs, prompt_length, target_length)
        if self._context_in_decoder:
            for weights_L, row in zip(batch.weights_BL, rows, strict=True):
                weights_L[: row.context] = 0
        return batch


def masked_rows(example: ScoringExample, mask: int, cls: int, sep: int) -> list[MaskedRow]:
    """One row per token of the continuation.

    context A B, continuation C D    CLS A B MASK D SEP -> C    CLS A B C MASK SEP -> D
    """
    row = [cls, *example.prompt.ids, *example.continuation, sep]
    first = 1 + len(example.prompt.ids)
    return [
        MaskedRow([*row[:index], mask, *row[index + 1 :]], index, row[index])
        for index in range(first, first + len(example.continuation))
    ]


def masked_batch(rows: Sequence[MaskedRow], width: int) -> Batch:
    """Masked rows, padded to `width`."""
    ids_BS, targets_BS, segments_BS = (np.zeros((len(rows), width), np.int32) for _ in range(3))
    weights_BS = np.zeros(ids_BS.shape, np.float32)
    for number, row in enumerate(rows):
        ids_BS[number, : len(row.ids)] = row.ids
        segments_BS[number, : len(row.ids)] = 1
        targets_BS[number, row.index], weights_BS[number, row.index] = row.target, 1
    return Batch(None, targets_BS, weights_BS, ids_BS, segments_BS)


def bucket(length: int) -> int:
    """The next power of two, at least `BUCKET`."""
    return max(BUCKET, 1 << max(length - 1, 0).bit_length())
