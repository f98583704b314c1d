"""Training from pairs of a chosen and a rejected answer, as a `train.task.Task`: DPO and others, and reward models."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5like.config.schema import Config
from t5like.distributed import processes
from t5like.distributed.watchdog import watchdog
from t5like.errors import CheckpointError, printable
from t5like.io.atomic import replace_file
from t5like.optim import eval_step
from t5like.optim.train_state import model_params
from t5like.rl.experience import Experience, answer_rows
from t5like.rl.prompts import Example
from t5like.rl.record_task import SAMPLES, RecordTask
from t5like.rl.reward_curve import PICTURE, draw_reward_curve
from t5like.types import Metrics, TrainState, Tree, host_metrics

SHOWN = 5  # held-out pairs in samples.txt
ACCURACY = "rewards/accuracies"  # the share of pairs whose chosen answer has the higher reward


class Pairs(RecordTask):
    """See `train.task.Task` for all attributes and methods."""

    summary_files = (PICTURE, SAMPLES)

    def __init__(self, config: Config, mesh: jax.sharding.Mesh, workdir: Path, show: Callable[[str], None]):
        """Read the pairs; see `RecordTask`. `show` prints a line."""
        paths = config.rl.chosen_field, config.rl.rejected_field
        super().__init__(config, mesh, workdir, [path.partition("/")[0] for path in paths])
        self._eval_step = eval_step.jit_eval_step(config, mesh, self.loss_fn)

    def device_batch(self, state: TrainState, index: int, batch: np.ndarray) -> tuple[Experience, Metrics]:
        """The pairs of a step, with the log-probabilities of the reference."""
        rows = self._rows([self._prompts.train[number] for number in self.batches.indices(batch)])
        arrays = self._arrays(self._layout(rows).rows(rows), model_params(state))
        self._keep(index, rows, arrays)
        return arrays, {}

    def _rows(self, examples: Sequence[Example]) -> Experience:
        prompts, answers = zip(*((example.prompt, example.answers) for example in examples), strict=True)
        return answer_rows(self._config, prompts, answers)

    def _arrays(self, rows: Experience, params: Tree) -> Experience:
        arrays = self._to_devices(rows)
        return self._with_reference(arrays, params) if self._config.rl.needs_reference else arrays

    def baselines(self) -> tuple[dict[str, float], str]:
        """The accuracy of preferring the longer answer, on the held-out pairs."""
        pairs = [example.answers for example in self._prompts.heldout[: self._config.rl.eval_prompts]]
        longer = np.mean([np.sign(len(chosen) - len(rejected)) / 2 + 0.5 for chosen, rejected in pairs])
        text = f"baseline: the longer answer is the chosen one in {100 * longer:.1f} %"
        return {"baseline/longer": float(longer)}, text

    def evaluate(self, params: Tree, done: int, point: Callable[[], None], *, early: bool) -> tuple[dict, str]:
        """The loss and its metrics on the first `rl.eval_prompts` held-out pairs."""
        values = self._measure(params, self._prompts.heldout[: self._config.rl.eval_prompts], point)
        accuracy, error = values[f"eval/{ACCURACY}"], values["eval/standard_error"]
        text = f"accuracy {accuracy:.3f} +- {error:.3f} (standard error)"
        return values, f"held-out loss {values['eval/loss']:.3f}, {text}"

    def evaluate_all(self, params: Tree) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The loss and its metrics on all held-out pairs; no records."""
        return self._measure(params, self._prompts.heldout, lambda: None), []

    def _measure(self, params: Tree, examples: Sequence[Example], point: Callable[[], None]) -> dict[str, float]:
        size, total = self._config.data.batch_size, None
        for first in range(0, len(examples), size):
            part = examples[first : first + size]
            arrays = self._arrays(self._rows((part * size)[:size]), params)  # not packed: one program for all parts
            counted_B11 = (np.arange(size) < len(part)).astype(np.float32)[:, None, None]
            mask_BGL = arrays.mask_BGL * self._to_devices(counted_B11)  # pairs that fill the batch up don't count
            arrays = arrays._replace(mask_BGL=mask_BGL)
            with watchdog("evaluation", times=2, mode="computing"), jax.set_mesh(self._mesh):
                if total is None:
                    total = eval_step.zero_metrics(self._config, params, self.spec, self.loss_fn)
                total = self._eval_step(params, arrays, total)
                total = jax.block_until_ready(total)
            point()
        total = jax.device_get(total)
        values = {f"eval/{name}": value for name, value in host_metrics(total).items()}
        accuracy, count = values[f"eval/{ACCURACY}"], float(total[ACCURACY].weight)
        return values | {"eval/standard_error": float(np.sqrt(accuracy * (1 - accuracy) / max(count, 1)))}

    def summarize(self, params: Tree, fingerprints: Mapping[str, Any]) -> list[str]:
        if not processes.is_primary():
            return []
        lines, decode = [], self.tokenizer.decode
        for example in self._prompts.heldout[:SHOWN]:
            for name, ids in zip(("prompt", "chosen", "rejected"), (example.prompt.ids, *example.answers), strict=True):
                lines.append(f"{name:8} {printable(decode(list(ids)))}")
            lines.append("")
        replace_file(self._workdir / SAMPLES, "\n".join(lines), CheckpointError, "move it away")
        picture, result = draw_reward_curve(self._workdir, "accuracy", f"train/{ACCURACY}", f"eval/{ACCURACY}")
        return [result, f"accuracy   {picture}"]
