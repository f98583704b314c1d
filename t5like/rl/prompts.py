"""Prompts of `t5like rl`, with the fields that rewards need; or pairs of answers to each prompt.

Records are read directly from `data.source`, not from token stores, because rewards need their fields. All prompts are
tokenized at the start and kept in memory; a record itself is read again when its answers are scored. Every process
reads all of them. The split into training and held-out prompts is that of `data.store`: by a hash of the inputs.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from t5like.config.schema import Config
from t5like.data.randomness import keyed_bits, permute
from t5like.data.row_schedule import RowSchedule
from t5like.data.sources.files import Record, RequiredFields, check_fields
from t5like.data.sources.labels import example_format
from t5like.data.sources.source import RecordSource, open_source
from t5like.data.sources.templates import Chat, Part, Templates, inputs_text, text_of
from t5like.data.store.shards import split_draws
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.errors import DataError
from t5like.inference.prompt_format import Prompt, PromptFormat
from t5like.metrics.progress import Progress
from t5like.rl.experience import fits
from t5like.rl.rewards.functions import INPUTS, TARGETS

FEWEST = 2  # examples of a source: one is held out


class Example(NamedTuple):
    """One prompt, tokenized.

    Attributes:
        source: index in `data.source`.
        record: index in the source.
        prompt: in the model's format.
        answers: ids of the chosen and the rejected answer, EOS included; empty without pairs.
    """

    source: int
    record: int
    prompt: Prompt
    answers: tuple[Sequence[int], ...] = ()


def reward_row(format: Templates | Chat, record: Record) -> dict[str, Any]:
    """What a reward takes: the fields of a record, and the texts of inputs and targets under these names."""
    parts = format.parts(record)
    targets = [part.text for part in parts if part.is_target]
    return {INPUTS: inputs_text(parts), **record.fields, TARGETS: targets[-1] if targets else ""}


def required_fields(config: Config, format: Templates | Chat, fields: Sequence[str]) -> RequiredFields:
    """The fields that templates, and rewards or pairs, need of each record."""
    names, fix, _ = format.required
    fixes = {name: "name in rl.rewards" for name in fields if name not in names}
    if config.rl.uses_pairs:
        settings = {"rl.chosen_field": config.rl.chosen_field, "rl.rejected_field": config.rl.rejected_field}
        fixes = {path.partition("/")[0]: f"set {setting} to" for setting, path in settings.items()}
    return RequiredFields(tuple(dict.fromkeys([*names, *fixes])), fix, fixes)


def first_rows(config: Config, fields: Sequence[str], count: int) -> list[dict[str, Any]]:
    """The rows of the first records of all sources, at most `count` of each, for an audit of the rewards."""
    format = example_format(config.data)
    wanted = required_fields(config, format, fields)
    sources = [open_source(spec, config.data, wanted) for spec in config.data.source]
    records = [source.record(index) for source in sources for index in range(min(count, len(source)))]
    for record in records:
        check_fields(record.where, record.fields, wanted)
    return [reward_row(format, record) for record in records]


class Prompts:
    """The training and held-out prompts of a run.

    Attributes:
        train, heldout: the examples of the two splits.
        data: a text that identifies the data of each source.
        notes: lines about examples that were left out.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, fields: Sequence[str], *, primary: bool = True):
        """Read and tokenize all records.

        Args:
            config: with `data.objective=supervised`.
            tokenizer: of the run.
            fields: of the records, in addition to those of the templates.
            primary: show progress.

        Raises:
            ConfigError, DataError: a source can't be read, a field is missing, or there are too few usable records.
        """
        self._config, self._tokenizer = config, tokenizer
        data = config.data
        if config.rl.uses_pairs and not data.messages_field:  # the split and the count of records need some target
            data = dataclasses.replace(data, targets_template=f"{{{config.rl.chosen_field}}}")
        self._frame, self._format = PromptFormat.of(config, tokenizer), example_format(data)
        self._wanted = required_fields(config, self._format, fields)
        self._sources: list[RecordSource] = [open_source(spec, config.data, self._wanted) for spec in data.source]
        self.train: list[Example] = []
        self.heldout: list[Example] = []
        self.data: dict[str, str] = {}
        self.notes: list[str] = []
        for number, spec in enumerate(config.data.source):
            self._read(number, spec, primary=primary)

    def row(self, example: Example) -> dict[str, Any]:
        """The row of an example that rewards take; see `reward_row`."""
        return reward_row(self._format, self._sources[example.source].record(example.record))

    def _read(self, number: int, spec: str, *, primary: bool) -> None:
        source, digest = self._sources[number], hashlib.sha256()
        draws, examples, too_long, empty = [], [], 0, 0
        with Progress(len(source), primary=primary, unit=f"reading {spec}: record") as bar:
            show = bar.timed()
            for index in range(len(source)):
                record = source.record(index)
                check_fields(record.where, record.fields, self._wanted)
                parts = self._format.parts(record)
                digest.update(json.dumps(record.fields, sort_keys=True, default=str).encode())
                if example := self._example(number, index, parts, record) if parts else None:
                    draws.append(split_draws(parts)[0])
                    examples.append(example)
                else:
                    too_long, empty = too_long + bool(parts), empty + (not parts)
                if index % 1000 == 999:
                    show(index + 1)
        self._check(spec, len(source), examples, draws, too_long)
        self._check_pairs(spec, examples)
        threshold = max(self._config.data.heldout_fraction, np.nextafter(min(draws), 1.0))
        for draw, example in zip(draws, examples, strict=True):
            (self.heldout if draw < threshold else self.train).append(example)
        self.data[spec] = f"{len(source):,} records, {digest.hexdigest()[:12]}"
        if too_long:
            self.notes.append(f"data.source={spec}: {too_long:,} of {len(source):,} examples are longer than a row")
        if empty:
            self.notes.append(f"data.source={spec}: {empty:,} examples have empty targets and are left out")

    def _check(self, spec: str, records: int, examples: Sequence[Example], draws: Sequence[float], too_long: int):
        data = self._config.data
        if too_long and not examples:
            raise DataError(
                f"data.source={spec}: all {too_long:,} prompts or answers are longer than "
                f"data.inputs_length={data.inputs_length} or data.targets_length={data.targets_length}; raise them"
            )
        if len(set(draws)) < FEWEST:
            raise DataError(
                f"data.source={spec} has {len(set(draws))} different prompts in {records:,} records, and one has to be "
                "held out; use more"
            )
        if max(draws) < data.heldout_fraction:
            raise DataError(
                f"data.heldout_fraction={data.heldout_fraction:g} leaves none of the {len(draws)} prompts in "
                f"data.source={spec} to train on; use data.heldout_fraction=0.1"
            )

    def _check_pairs(self, spec: str, examples: Sequence[Example]) -> None:
        """Count the pairs without a preference; refuse a source that has no others."""
        equal = sum(len(set(map(tuple, example.answers))) == 1 for example in examples)
        fields = f"{self._config.rl.chosen_field} and {self._config.rl.rejected_field}"
        if equal == len(examples):
            raise DataError(f"data.source={spec}: {fields} are equal in all {equal:,} pairs; use pairs that differ")
        if equal:
            self.notes.append(f"data.source={spec}: {fields} are equal in {equal:,} of {len(examples):,} pairs")

    def _example(self, source: int, index: int, parts: Sequence[Part], record: Record) -> Example | None:
        """The example, or None if it is longer than a row."""
        eos = self._tokenizer.eos_id
        last = max(index for index, part in enumerate(parts) if part.is_target)
        inputs = [token for part in parts[:last] for token in (*self._tokenizer.encode(part.text), eos)]
        prompt, answers = self._frame.input_prompt(inputs), ()
        if self._config.rl.uses_pairs:
            settings = {f"rl.{name}": getattr(self._config.rl, name) for name in ("chosen_field", "rejected_field")}
            texts = [text_of(record, path, setting) for setting, path in settings.items()]
            answers = tuple([*self._tokenizer.encode(text), eos] for text in texts)
        return Example(source, index, prompt, answers) if fits(self._config, prompt, answers) else None


class PromptBatches:
    """The training prompts of each step: a permutation of all prompts in every epoch, as a function of (seed, row)."""

    def __init__(self, config: Config, count: int):
        """`count`: number of training prompts."""
        self.config, self._count = config, count
        self.schedule = RowSchedule.of(config.data.batch_size)

    def follow(self, schedule: RowSchedule) -> None:
        """Use another schedule of rows from now on."""
        self.schedule = schedule

    def at(self, step: int, rows: np.ndarray | None = None) -> np.ndarray:
        """The row numbers of a step's prompts, int64 [B]; `rows` is ignored, every process has all of them.

        With `rl.updates_per_rollout`, that many steps have the same prompts.
        """
        updates = self.config.rl.updates_per_rollout
        first = self.schedule.first_row(step - step % updates) // updates
        return first + np.arange(self.config.data.batch_size)

    def indices(self, rows_B: np.ndarray, redraw: int = 0) -> np.ndarray:
        """The index of each row's prompt, int64 [B]; another one for each redraw."""
        epoch_B, position_B = np.divmod(rows_B.astype(np.uint64), np.uint64(self._count))
        keys_B = keyed_bits(self.config.seed, redraw, epoch_B)
        return permute(position_B, np.full(len(rows_B), self._count, np.uint64), keys_B).astype(np.int64)
