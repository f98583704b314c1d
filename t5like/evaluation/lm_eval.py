"""Public benchmarks: lm-evaluation-harness (the package `lm-eval`) on a checkpoint of any shape.

`T5LikeLM` is its model class over ours, `evaluate_tasks` what `t5like evaluate --tasks=...` runs. Importing this module
needs the extra `harness`. Nothing is downloaded: tasks are the package's own or YAML files in a directory, and their
data local files or what the Hugging Face cache has. HF_HUB_OFFLINE=0 HF_DATASETS_OFFLINE=0 in the environment allow it.
"""

import contextlib
import difflib
import json
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t5like.checkpoint.run_directory import Run
from t5like.errors import ConfigError, DataError
from t5like.inference.loglikelihood import MAX_NEW_TOKENS, LoglikelihoodScorer
from t5like.io.paths import expand
from t5like.metrics.progress import Progress

try:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):  # read when they are imported
        os.environ.setdefault(name, "1")
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ConfigError(f"--tasks needs the package lm-eval ({error}); pip install 't5like[harness]'") from None

# What a task may ask of generation, and we take.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
BOOTSTRAP = 1000  # samples for the standard errors of measures that have no formula


class T5LikeLM(LM):
    """A run as lm-eval's model."""

    def __init__(self, run: Run):
        super().__init__()
        self.scorer = LoglikelihoodScorer(run.config, run.mesh, run.params, run.tokenizer, Shown())
        self._name = f"t5like-{run.tokenizer.hash[:16]}"

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's caches."""
        return self._name

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """log p of each continuation, and whether greedy decoding says it."""
        found = [tuple(pair) for pair in self.scorer.score_pairs([request.args for request in requests])]
        return self._kept("loglikelihood", requests, found)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """log p of whole texts."""
        found = self.scorer.score_texts([request.args[0] for request in requests])
        return self._kept("loglikelihood_rolling", requests, found)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What is said to each context, up to the task's stop texts."""
        groups = defaultdict(list)
        for number, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(number)
        said: dict[int, str] = {}
        for asked, numbers in groups.items():
            contexts = [requests[number].args[0] for number in numbers]
            said |= zip(numbers, self.scorer.generate(contexts, **decoding(json.loads(asked))), strict=True)
        return self._kept("generate_until", requests, [said[number] for number in range(len(requests))])

    def _kept(self, method: str, requests: list[Instance], found: list) -> list:
        for request, value in zip(requests, found, strict=True):
            self.cache_hook.add_partial(method, request.args, value)
        return found


def decoding(asked: dict[str, Any]) -> dict[str, Any]:
    """A task's `generation_kwargs` as arguments of `LoglikelihoodScorer.generate`.

    Temperature 0 is greedy, whatever do_sample says, as with vLLM (lm-eval's own class refuses it); do_sample without a
    temperature is at 1, as in transformers.

    Raises:
        ConfigError: it asks for what we don't have.
    """
    asked = dict(asked)
    stop = asked.pop("until", None) or []
    lengths = [int(asked.pop(name)) for name in LENGTHS if asked.get(name) is not None]
    temperature, sample = asked.pop("temperature", None), asked.pop("do_sample", None)
    if temperature is None:
        temperature = 1.0 if sample else 0.0
    temperature = 0.0 if sample is False else float(temperature)
    neutral = {"top_p": 1.0, "top_k": 0, "num_beams": 1}
    more = {name: value for name, value in asked.items() if value is not None and neutral.get(name) != value}
    if more and (temperature or set(more) - {"top_p", "top_k"}):
        name, value = next(iter(more.items()))
        raise ConfigError(
            f"generation_kwargs.{name}={value} of the task is not known here; leave it out (until, do_sample, "
            f"temperature and {LENGTHS[0]} are)"
        )
    return {
        "stop": [stop] if isinstance(stop, str) else stop,
        "max_new_tokens": lengths[0] if lengths else MAX_NEW_TOKENS,
        "temperature": temperature,
    }


class Shown:
    """Shows how far a request of many rows is, one bar or line behind the other."""

    def __init__(self) -> None:
        self._bar: Progress | None = None

    def __call__(self, what: str, done: int, count: int) -> None:
        if self._bar is None:
            self._bar = Progress(count, unit=what).__enter__()
            self._show = self._bar.timed()
        self._show(done)
        if done == count:
            self._bar.__exit__(None, None, None)
            self._bar = None


def evaluate_tasks(
    run: Run, tasks: Sequence[str], *, directory: Path | None = None, limit: int | None = None, shots: int | None = None
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Run lm-eval's tasks on a run.

    Args:
        tasks: names of tasks, groups or tags.
        directory: with YAML files of more tasks; paths in them are relative to it.
        limit: the first examples of each task; None: all.
        shots: examples with answers before each question; None: what the task says.

    Returns:
        the step, the measures by task, and what they rest on: versions, numbers of examples and shots, how many
        contexts were cut; and the examples of each task with what the model answered.

    Raises:
        ConfigError: there is no such task, or it asks for what the model can't do.
        DataError: a task can't be loaded.
    """
    for name in ("lm_eval", "lm-eval", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap would fork a process that has threads
    directory = None if directory is None else expand(directory).absolute()
    # Standard output is for the result alone; data files that a task names are found from its directory.
    with contextlib.redirect_stdout(sys.stderr), contextlib.chdir(directory or "."):
        manager = task_manager(tasks, directory)
        check_tasks(manager, tasks, directory)
        model = T5LikeLM(run)
        found = lm_eval.simple_evaluate(
            model,
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=BOOTSTRAP,
            log_samples=True,
        )
    scorer = model.scorer
    values = {
        "step": run.step,
        "results": found["results"],
        **({"groups": found["groups"]} if found.get("groups") else {}),
        "num_fewshot": found["n-shot"],
        "examples": found["n-samples"],
        "versions": {**found["versions"], "lm_eval": lm_eval.__version__},
        "contexts": {
            "asked": scorer.num_contexts,
            "cut": scorer.num_truncated,
            "tokens_cut": scorer.truncated_tokens,
            "length": scorer.length,
        },
        "answers_shortened": scorer.num_shortened,
    }
    return json.loads(json.dumps(values, default=str)), {
        task: [record(sample) for sample in samples] for task, samples in found["samples"].items()
    }


def record(sample: dict[str, Any]) -> dict[str, Any]:
    """What there is to read of one example: itself, the right answer, the model's, and the measures."""
    measures = {name: sample[name] for name in sample.get("metrics", ())}
    kept = {"doc": sample["doc"], "target": sample["target"], "prediction": sample["filtered_resps"], **measures}
    return json.loads(json.dumps(kept, default=str))


def task_manager(tasks: Sequence[str], directory: Path | None) -> TaskManager:
    """What knows the tasks: of the directory's alone where it has all of them, for lm-eval's own take long to list."""
    if directory is None:
        return TaskManager()
    own = TaskManager(include_path=str(directory), include_defaults=False)
    return own if set(tasks) <= set(own.all_tasks) else TaskManager(include_path=str(directory))


def check_tasks(manager: TaskManager, tasks: Sequence[str], directory: Path | None) -> None:
    """Refuse unknown tasks, and those whose data are not here, before the model does anything."""
    known = [*manager.all_tasks, *manager.all_groups, *manager.all_tags]
    for task in tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, 1)
            where = "" if directory is None else f" or in --tasks_dir={directory}"
            raise ConfigError(
                f"--tasks={task} is no task of lm-eval {lm_eval.__version__}{where}; use "
                f"{near[0] if near else 'lambada_openai'}"
            )
        try:
            manager.load([task])
        except Exception as error:  # a YAML file's mistakes come as anything
            reason = " ".join(str(error).split())[:300]
            raise DataError(
                f"--tasks={task} can't be loaded ({type(error).__name__}: {reason}); mend its YAML or data, or allow "
                "downloads with HF_HUB_OFFLINE=0 HF_DATASETS_OFFLINE=0"
            ) from None


def table(values: dict[str, Any]) -> str:
    """What `evaluate_tasks` found, for people."""
    lines = [f"step {values['step']:,}, lm-eval {values['versions']['lm_eval']}"]
    for task, measures in {**values["results"], **values.get("groups", {})}.items():
        for name, value in measures.items():
            measure, _, filtered = name.partition(",")
            if filtered and not measure.endswith("_stderr") and isinstance(value, float):
                error = measures.get(f"{measure}_stderr,{filtered}")
                more = f" +- {error:.4f}" if isinstance(error, float) else ""
                lines.append(f"{task}  {measure} ({filtered})  {value:.4f}{more}")
    contexts = values["contexts"]
    if contexts["cut"]:
        lines.append(
            f"{contexts['cut']:,} of {contexts['asked']:,} contexts were cut from the left to {contexts['length']:,} "
            f"tokens, by {contexts['tokens_cut']:,} tokens in all"
        )
    if values["answers_shortened"]:
        lines.append(f"{values['answers_shortened']:,} answers had fewer tokens than asked for: no more positions")
    return "\n".join(lines)
