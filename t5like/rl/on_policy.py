"""Training by rewards of the model's own answers, as a `train.task.Task`.

Each step: prompts of the step (`prompts`), answers and rewards (`collection`), advantages (`advantages`), then one or
more updates with the loss of `objective`. `train.loop` does the rest: checkpoints, rewinds, preemption.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5like.checkpoint.step_directories import complete_steps
from t5like.config.schema import Config
from t5like.distributed import processes
from t5like.errors import CheckpointError, DataError, Diverged, printable
from t5like.io.atomic import replace_file
from t5like.optim.train_state import model_params
from t5like.rl import advantages, collection, experience
from t5like.rl.collection import Collected, Collector
from t5like.rl.experience import Experience, answer_rows, in_rows
from t5like.rl.record_task import SAMPLES, RecordTask
from t5like.rl.reward_curve import PICTURE, draw_reward_curve
from t5like.rl.rewards.functions import TARGETS
from t5like.rl.scorer import Scorer
from t5like.sharding.placement import to_host
from t5like.types import Metrics, TrainState, Tree

TABLES = "answers"  # folder in a run directory
SHOWN = 5  # held-out prompts in samples.txt, at most those of an evaluation


class OnPolicy(RecordTask):
    """See `train.task.Task` for all attributes and methods."""

    summary_files = (PICTURE, SAMPLES)

    def __init__(
        self,
        config: Config,
        mesh: jax.sharding.Mesh,
        workdir: Path,
        show: Callable[[str], None],
        *,
        scorer: Scorer,
    ):
        """Read the prompts.

        Args:
            config: resolved for `mesh`.
            mesh: of the run.
            workdir: the run directory.
            show: prints a line.
            scorer: computes the rewards.

        Raises:
            ConfigError, DataError: the data can't be used.
        """
        super().__init__(config, mesh, workdir, scorer.fields)
        self._scorer, self._show = scorer, show
        self._collector = Collector(config, mesh, self.tokenizer, self._prompts, scorer)
        self._metrics: Metrics = {}
        self._evaluated: list[Collected] = []  # answers of the last evaluation, until the next step
        rewards = ", ".join(f"{weight:g} x {name}" for name, weight in zip(scorer.names, scorer.weights, strict=True))
        self.lines = [*self.lines, f"rewards    {rewards}"]

    def device_batch(self, state: TrainState, index: int, batch: np.ndarray) -> tuple[Experience, Metrics]:
        """Sample and score the answers of a step; the steps of `rl.updates_per_rollout` share them."""
        self._evaluated = []
        if index % self.updates_per_batch == 0 or not self._has(index):
            *made, self._metrics = self._new_experience(state, index, batch)
            self._keep(index, *made)
        return self._kept(index)[1], self._metrics

    def _new_experience(
        self, state: TrainState, index: int, rows_B: np.ndarray
    ) -> tuple[Experience, Experience, Metrics]:
        """Host rows, device arrays and metrics of new answers."""
        rl, params = self._config.rl, model_params(state)
        collected = self._collector.collect(params, self.batches, rows_B)
        prompts = [example.prompt for example in collected.examples]
        rows = answer_rows(self._config, prompts, collected.answers.ids)
        sampler_BGL = in_rows(rows, collected.answers.log_p_BGL)
        rows = rows._replace(sampler_log_p_BGL=sampler_BGL)
        layout, scored, kl_BGL = self._layout(rows), None, None
        arrays = self._to_devices(layout.rows(rows))
        with jax.set_mesh(self._mesh):
            if rl.needs_reference:
                arrays = self._with_reference(arrays, params)
                kl_BGL = (sampler_BGL - layout.unpacked(to_host(arrays.reference_log_p_BGL))) * rows.mask_BGL
                self._check_kl(kl_BGL, rows.mask_BGL, index)
            if experience.needs_old(self._config):
                scored = self._scores(params, arrays.answers())
                arrays = arrays._replace(old_log_p_BGL=scored.log_p_BGL)
        values_BGL = layout.unpacked(to_host(scored.values_BGL)) if rl.advantage == "gae" else None
        rows = self._with_advantages(rows, collected, kl_BGL if rl.kl_as == "reward" else None, values_BGL)
        made = {name: getattr(rows, name) for name in ("mask_BGL", "advantages_BGL", "old_values_BGL", "returns_BGL")}
        packed = {name: layout.packed(x_BGL) for name, x_BGL in made.items() if x_BGL is not None}
        arrays = arrays._replace(**self._to_devices(packed))
        if rl.table_every and (index % rl.table_every == 0) and processes.is_primary():
            self._write_table(index, collected)
        if not np.isfinite(collected.total_BG).any():
            why = "; ".join(self._scorer.failures())
            self._show(f"WARNING: step {index + 1:,}: no answer has a reward, so there is no gradient; {why}")
        return rows, arrays, collection.metrics(self._scorer, collected)

    def _check_kl(self, kl_BGL: np.ndarray, mask_BGL: np.ndarray, index: int) -> None:
        """Raise Diverged if the mean of the k3 estimator per token is above `rl.max_kl`."""
        limit = self._config.rl.max_kl
        kl = ((np.expm1(np.clip(-kl_BGL, -20, 20)) + kl_BGL) * mask_BGL).sum() / max(mask_BGL.sum(), 1)
        if limit and kl > limit:
            every = self._config.train.checkpoint_every
            before = [step for step in complete_steps(self._workdir / "checkpoints") if step < index]
            good = max(0, (index - 1) // every * every, *before)  # it may be still being written, by this process
            newest = f"the newest checkpoint below it is of step {good:,}" if good else "no checkpoint is below it"
            raise Diverged(
                f"after step {index:,} the KL divergence from the first weights is {kl:.3g} per token, more than "
                f"rl.max_kl={limit:g}; {newest}; look at the answers in "
                f"{self._workdir / TABLES}: the rewards may pay for something else than intended; raise "
                "rl.kl_coefficient, or lower optimizer.learning_rate"
            )

    def _with_advantages(
        self, rows: Experience, collected: Collected, kl_BGL: np.ndarray | None, values_BGL: np.ndarray | None
    ) -> Experience:
        """The rows with advantages, and with the values and returns of PPO."""
        rl, total_BG, mask_BGL = self._config.rl, collected.total_BG, rows.mask_BGL
        counted_BGL = mask_BGL
        if rl.truncated_answers == "mask":
            counted_BGL = mask_BGL * ~collected.answers.truncated_BG[..., None]
        if rl.advantage != "gae":
            if kl_BGL is not None:
                total_BG = total_BG - rl.kl_coefficient * kl_BGL.sum(-1)
            advantages_BG = advantages.advantages(rl.advantage, total_BG)
            return rows._replace(mask_BGL=counted_BGL, advantages_BGL=advantages_BG[..., None] * counted_BGL)
        counted_BGL = counted_BGL * np.isfinite(total_BG)[..., None]  # an answer without reward is not learned from
        rewards_BGL = experience.last_tokens(mask_BGL) * np.nan_to_num(total_BG)[..., None]
        if kl_BGL is not None:
            rewards_BGL = rewards_BGL - rl.kl_coefficient * kl_BGL
        advantages_BGL, returns_BGL = advantages.gae(rewards_BGL, values_BGL, mask_BGL, rl.discount, rl.gae_lambda)
        return rows._replace(
            mask_BGL=counted_BGL.astype(np.float32),
            advantages_BGL=advantages.whiten(advantages_BGL, counted_BGL).astype(np.float32),
            old_values_BGL=values_BGL.astype(np.float32),
            returns_BGL=returns_BGL.astype(np.float32),
        )

    def _write_table(self, index: int, collected: Collected) -> None:
        """Write the sampled answers of a step with their rewards to ``answers/STEP.jsonl``."""
        path = self._workdir / TABLES / f"{index}.jsonl"
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in self._records(collected)]
        path.parent.mkdir(exist_ok=True)
        replace_file(path, "".join(lines), CheckpointError, "move it away")

    def _records(self, collected: Collected) -> list[dict[str, Any]]:
        known = lambda value: float(value) if np.isfinite(value) else None
        return [
            {
                "prompt": self.tokenizer.decode(example.prompt.ids),
                "target": self._prompts.row(example)[TARGETS],
                "answer": text,
                "reward": known(collected.total_BG[b, g]),
                **{
                    f"rewards/{name}": known(collected.rewards_RBG[r, b, g])
                    for r, name in enumerate(self._scorer.names)
                },
                "tokens": len(collected.answers.ids[b][g]),
                "truncated": bool(collected.answers.truncated_BG[b, g]),
            }
            for b, example in enumerate(collected.examples)
            for g, text in enumerate(collected.answers.texts[b])
        ]

    def baselines(self) -> tuple[dict[str, float], str]:
        """No metrics: `t5like rl --audit` scores answers that need no model."""
        return {}, "held-out rewards are those of greedy decoding"

    def evaluate(self, params: Tree, done: int, point: Callable[[], None], *, early: bool) -> tuple[dict, str]:
        """Rewards of greedy answers to the first `rl.eval_prompts` held-out prompts.

        Raises:
            DataError: before the first step, and none of them has a reward; later, the run goes on.
        """
        values, parts = self._answer_heldout(params, self._config.rl.eval_prompts, point)
        has_value = lambda part: np.isfinite(part.rewards_RBG).any() and np.isfinite(part.total_BG).any()
        if not done and not any(map(has_value, parts)):
            why = "; ".join(self._scorer.failures())
            raise DataError(f"rl.rewards: no held-out answer has a reward; {why}; t5like rl --audit tests rewards")
        self._evaluated = parts
        error = values["eval/standard_error"]
        held_out = f"held-out reward {values['eval/reward']:.3f} +- {error:.3f} (standard error{_missing(parts)})"
        return values, held_out

    def evaluate_all(self, params: Tree) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Rewards of greedy answers to all held-out prompts, and a record of each answer."""
        values, parts = self._answer_heldout(params, len(self._prompts.heldout), lambda: None)
        return values, [record for part in parts for record in self._records(part)]

    def _answer_heldout(
        self, params: Tree, count: int, point: Callable[[], None]
    ) -> tuple[dict[str, float], list[Collected]]:
        examples, size = self._prompts.heldout[:count], self._config.data.batch_size
        parts = []
        for first in range(0, len(examples), size):
            part = examples[first : first + size]
            collected = self._collector.answer(params, (part * size)[:size])
            parts.append(collected.first(len(part)))
            point()
        joined = lambda get: np.concatenate([get(part) for part in parts])
        total_N = joined(lambda part: part.total_BG[:, 0])
        known_N = total_N[np.isfinite(total_N)]
        values = {
            "eval/reward": collection.mean(total_N),
            "eval/standard_error": float(known_N.std(ddof=1) / np.sqrt(known_N.size)) if known_N.size > 1 else 0.0,
            "eval/failed_rewards": float(total_N.size - known_N.size),
            "eval/completions/mean_length": float(joined(lambda part: part.answers.lengths_BG).mean()),
            "eval/completions/clipped_ratio": float(joined(lambda part: part.answers.truncated_BG).mean()),
        }
        for number, name in enumerate(self._scorer.names):
            reward_N = joined(partial(lambda part, number: part.rewards_RBG[number], number=number))
            values[f"eval/rewards/{name}/mean"] = collection.mean(reward_N)
        return values, parts

    def summarize(self, params: Tree, fingerprints: Mapping[str, Any]) -> list[str]:
        count = min(SHOWN, self._config.rl.eval_prompts)
        parts = self._evaluated or self._answer_heldout(params, count, lambda: None)[1]
        if not processes.is_primary():
            return []
        lines = []
        for record in [record for part in parts for record in self._records(part)][:count]:
            lines += [f"{name:7} {printable(str(record[name]))}" for name in ("prompt", "target", "answer", "reward")]
            lines.append("")
        replace_file(self._workdir / SAMPLES, "\n".join(lines), CheckpointError, "move it away")
        picture, result = draw_reward_curve(self._workdir, "reward", "train/reward", "eval/reward")
        if self._evaluated:
            result += _missing(parts)
        return ["", *lines, *(f"WARNING: {line}" for line in self._scorer.failures()), result, f"rewards    {picture}"]


def _missing(parts: Sequence[Collected]) -> str:
    """What a mean reward leaves out: answers whose reward failed, with `rl.failed_reward=exclude`."""
    totals_N = np.concatenate([part.total_BG.ravel() for part in parts])
    failed = np.isnan(totals_N).sum()
    return f"; without {failed:,} of {totals_N.size:,} answers, whose reward failed" if failed else ""
