"""The data of one step of a run or of a config: tokenizer, token stores, and the rows of the step.

The batch of a step is a function of (config, schedule, step). A run's rows follow the schedule in its newest
checkpoint, which knows rewinds and other batch sizes; its config is that of the step. No device and no parameter is
needed, so the config may be that of thousands of chips. Called by `inspect.data`.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np

from t5like.checkpoint.run_directory import checkpoints_of, config_of, with_run_tokenizer
from t5like.config.schema import Config
from t5like.data import pipeline
from t5like.data.objectives.windows import TextWindows
from t5like.data.pipeline import CORRUPTION, Batches, Component
from t5like.data.randomness import keyed_bits
from t5like.data.row_schedule import RowSchedule
from t5like.data.store import preparation
from t5like.data.store.token_store import TokenStore
from t5like.data.store.verification import Verification
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.data.tokenizers.vocabulary import Vocabulary
from t5like.inspect import replay
from t5like.train.evidence import FOLDER, read_record
from t5like.types import Batch

MOST_POSITIONS = 2**22  # of the examined rows of a batch


class Plan(NamedTuple):
    """Which step is shown, before any data are opened.

    Attributes:
        config: at that step.
        number: the update, from 1.
        schedule: the first row of each step.
        notes: lines about the step, such as a rewind.
    """

    config: Config
    number: int
    schedule: RowSchedule
    notes: tuple[str, ...] = ()

    @property
    def first_row(self) -> int:
        """The first row of the step."""
        return self.schedule.first_row(self.number - 1)


def plan_of_config(config: Config, number: int) -> Plan:
    """Update `number` of a run that would start with this config."""
    return Plan(config, number, RowSchedule.of(config.data.batch_size))


def plan_of_run(workdir: Path, number: int) -> Plan:
    """Update `number` of a run: one that it has made, or will make.

    Raises:
        CheckpointError: there is no run, or its files can't be read.
    """
    saved = config_of(workdir)
    checkpoints = checkpoints_of(workdir, saved)
    steps, schedule = checkpoints.steps(), RowSchedule.of(saved.data.batch_size)
    config = replay.config_at(workdir, checkpoints, number)
    if steps:
        schedule = checkpoints.meta(steps[-1]).history.rows
        if number > steps[-1]:  # the run continues with the batch size of its config.json
            schedule = schedule.with_batch_size(steps[-1], config.data.batch_size)
    segment = next(each for each in reversed(schedule.segments) if each.step < number)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=segment.batch_size))
    config = with_run_tokenizer(config, workdir)
    if (own := workdir / "tokenizer.model").is_file():
        config = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, path=str(own)))
    return Plan(config, number, schedule, tuple(_notes(workdir, schedule, number)))


def _notes(workdir: Path, schedule: RowSchedule, number: int) -> list[str]:
    notes = [
        f"the run went back to step {step:,} and passed over {rows:,} rows; these are the rows it then trained on"
        for step, rows in schedule.passed_over()
        if step < number
    ]
    if record := read_record(workdir, number):
        where = f"rows {record['first_row']:,} to {record['first_row'] + record['batch_size'] - 1:,}"
        kept = workdir / FOLDER / str(number)
        notes.append(f"step {number:,} was bad with {where} ({record['reason']}); {kept} has them")
    return notes


class StepData(NamedTuple):
    """The opened data of a step of running text or supervised examples."""

    plan: Plan
    tokenizer: Tokenizer
    tokenizer_path: Path
    stores: tuple[TokenStore, ...]
    batches: Batches
    notes: tuple[str, ...]

    @property
    def components(self) -> tuple[Component, ...]:
        """See `pipeline.components`."""
        return self.batches.components

    def component_of(self, rows_N: np.ndarray) -> np.ndarray:
        """The component of some rows of the batch, int64 [N]."""
        return self.batches.locate((self.plan.first_row + rows_N).astype(np.uint64))[0]

    def rows(self, rows_N: np.ndarray) -> Batch:
        """Some rows of the batch, by their index in it."""
        return self.batches.at(self.plan.number - 1, rows_N)

    def text(self, rows_N: np.ndarray, component: int) -> TextWindows | None:
        """The stored text of rows that belong to one component; None for supervised examples."""
        if self.components[component].denoiser is None:
            return None
        row_N = (self.plan.first_row + rows_N).astype(np.uint64)
        _, index_N, offset_N = self.batches.locate(row_N)
        keys_N = keyed_bits(self.plan.config.seed, CORRUPTION, row_N)
        return self.batches.row_sources[component].text(index_N, offset_N, keys_N)

    def examined_rows(self) -> np.ndarray:
        """Indices of all rows of the batch, or of as many as have `MOST_POSITIONS` positions, at even distances."""
        size = self.plan.config.data.batch_size
        most = max(MOST_POSITIONS // max(self.plan.config.row_length, 1), 1)
        return np.arange(size) if size <= most else np.linspace(0, size - 1, most).astype(np.int64)

    def shown_rows(self, count: int) -> np.ndarray:
        """The indices of the rows to show: the first of each component, then the first of the batch, ascending."""
        size = self.plan.config.data.batch_size
        component_B = self.component_of(np.arange(min(size, MOST_POSITIONS)))
        firsts = np.sort(np.unique(component_B, return_index=True)[1])
        return np.sort(np.array(list(dict.fromkeys([*firsts[:count].tolist(), *range(min(size, count))]))[:count]))


def open_data(plan: Plan) -> StepData:
    """Prepare the stores of a plan if they are missing, and open them.

    Raises:
        ConfigError, DataError, CheckpointError: see `preparation.prepare` and `pipeline.Batches`.
    """
    config = plan.config
    pipeline.spec(config)
    prepared = preparation.prepare(config)
    Verification(prepared.stores)  # small stores now; the tokens of large ones are read without
    split = pipeline.open_split(config, prepared.stores, "train")
    batches = Batches(config, Vocabulary.of(prepared.tokenizer), split)
    batches.follow(plan.schedule)
    notes = [*prepared.notes, *(part.note for part in split if getattr(part, "note", ""))]
    return StepData(plan, prepared.tokenizer, prepared.tokenizer_path, prepared.stores, batches, tuple(notes))
