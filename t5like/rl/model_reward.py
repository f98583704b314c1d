"""The score of a trained reward model as a reward: ``run:DIR`` in `rl.rewards`."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5like.checkpoint import run_directory
from t5like.data.sources.files import Record
from t5like.data.sources.templates import Templates
from t5like.errors import ConfigError
from t5like.inference.prompt_format import PromptFormat
from t5like.rl.experience import answer_rows, fits
from t5like.rl.objective import answer_scores
from t5like.sharding import placement
from t5like.sharding.placement import to_host

FLAG = "rl.rewards=run:"  # before the directory, in messages


class RewardModel:
    """A reward model on all devices. It has its own tokenizer and its own template of the prompt.

    Attributes:
        fields: of a record that its template needs.
    """

    def __init__(self, directory: Path):
        """Read the newest checkpoint of the run in a directory.

        Raises:
            CheckpointError: there is no run, or it can't be read.
            ConfigError: it is no reward model.
        """
        if (method := run_directory.config_of(directory, FLAG).rl.method) != "reward_model":
            rule = "must be a run of rl.method=reward_model"
            raise ConfigError(f"{FLAG}{directory} {rule}; its rl.method is {method}")
        self._run = run = run_directory.load(directory, all_devices=True, flag=FLAG)
        inputs = run.config.data.inputs_template  # the targets of its records are not those of other data
        self._template = Templates(dataclasses.replace(run.config.data, targets_template=inputs))
        self._format = PromptFormat.of(run.config, run.tokenizer)
        self.fields = self._template.required.names
        self._scores = jax.jit(partial(answer_scores, run.config))

    def __call__(self, rows: Sequence[Mapping[str, Any]], answers: Sequence[Sequence[str]]) -> np.ndarray:
        """float64 [B, G]: the scores of G answers to each prompt; NaN where prompt or answer is longer than a row.

        All processes call it with the same arguments.
        """
        run, encode = self._run, self._run.tokenizer.encode
        eos = run.tokenizer.eos_id
        inputs = [[*encode(self._template.parts(Record(dict(row), "a prompt"))[0].text), eos] for row in rows]
        prompts = [self._format.input_prompt(ids) for ids in inputs]
        ids = [[[*encode(text), eos] for text in of_prompt] for of_prompt in answers]
        fits_BG = np.array(
            [
                [fits(run.config, prompt, [answer]) for answer in of_prompt]
                for prompt, of_prompt in zip(prompts, ids, strict=True)
            ]
        )
        short = [eos]  # takes the place of what is longer than a row
        prompts = [
            prompt if fits(run.config, prompt, [short]) else self._format.input_prompt(short) for prompt in prompts
        ]
        ids = [
            [answer if fit else short for answer, fit in zip(of_prompt, fit_G, strict=True)]
            for of_prompt, fit_G in zip(ids, fits_BG, strict=True)
        ]
        size = -(-len(rows) // run.mesh.size) * run.mesh.size
        repeated = lambda values: [*values, *values[:1] * (size - len(values))]
        experience = answer_rows(run.config, repeated(prompts), repeated(ids))
        arrays = placement.all_to_global(experience, run.mesh, size)
        with jax.set_mesh(run.mesh):
            scores_BG = to_host(self._scores(run.params, arrays))[: len(rows)]
        return np.where(fits_BG, scores_BG.astype(np.float64), np.nan)
