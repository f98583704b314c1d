"""Public benchmarks: lm-evaluation-harness (the package `lm-eval`) on a checkpoint of any architecture.

`T5LikeLM` implements the harness's model class; `t5like evaluate --tasks=...` calls `evaluate_tasks`. This module needs
the extra `harness`. Nothing is downloaded: tasks are those of the package, or YAML files in a directory, and their data
are local files or in the Hugging Face cache. HF_HUB_OFFLINE=0 HF_DATASETS_OFFLINE=0 in the environment allow downloads.
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
from t5like.errors import ConfigError, DataError, one_line
from t5like.inference.loglikelihood import MAX_NEW_TOKENS, LoglikelihoodScorer
from t5like.io.paths import expand
from t5like.metrics.progress import Progress

try:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):  # the packages read them on import
        os.environ.setdefault(name, "1")
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ConfigError(f"--tasks needs the package lm-eval ({error}); pip install 't5like[harness]'") from None

# Keys of a task's generation_kwargs that limit the new tokens.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
BOOTSTRAP = 1000  # samples for standard errors of metrics without a closed form


class T5LikeLM(LM):
    """A run as a model of lm-eval."""

    def __init__(self, run: Run):
        super().__init__()
        self.scorer = LoglikelihoodScorer(run.config, run.mesh, run.params, run.tokenizer, RequestProgress())
        self._name = f"t5like-{run.tokenizer.hash[:16]}"

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name in lm-eval's caches."""
        return self._name

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """log p of each continuation, and whether greedy decoding generates it."""
        scores = [tuple(pair) for pair in self.scorer.score_pairs([request.args for request in requests])]
        return self._cached("loglikelihood", requests, scores)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """log p of full texts."""
        log_p = self.scorer.score_texts([request.args[0] for request in requests])
        return self._cached("loglikelihood_rolling", requests, log_p)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The text generated after each context, up to the task's stop texts."""
        groups = defaultdict(list)
        for number, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(number)
        texts: dict[int, str] = {}
        for arguments, numbers in groups.items():
            contexts = [requests[number].args[0] for number in numbers]
            options = generation_options(json.loads(arguments))
            texts |= zip(numbers, self.scorer.generate(contexts, **options), strict=True)
        return self._cached("generate_until", requests, [texts[number] for number in range(len(requests))])

    def _cached(self, method: str, requests: list[Instance], values: list) -> list:
        for request, value in zip(requests, values, strict=True):
            self.cache_hook.add_partial(method, request.args, value)
        return values


def generation_options(generation_kwargs: dict[str, Any]) -> dict[str, Any]:
    """A task's `generation_kwargs` as arguments of `LoglikelihoodScorer.generate`.

    Temperature 0 is greedy whatever do_sample is, as in vLLM (lm-eval's own class refuses it). do_sample without a
    temperature uses temperature 1, as transformers does.

    Raises:
        ConfigError: an option is not supported.
    """
    options = dict(generation_kwargs)
    stop = options.pop("until", None) or []
    lengths = [int(options.pop(name)) for name in LENGTHS if options.get(name) is not None]
    temperature, sample = options.pop("temperature", None), options.pop("do_sample", None)
    if temperature is None:
        temperature = 1.0 if sample else 0.0
    temperature = 0.0 if sample is False else float(temperature)
    neutral = {"top_p": 1.0, "top_k": 0, "num_beams": 1}
    unsupported = {name: value for name, value in options.items() if value is not None and neutral.get(name) != value}
    if unsupported and (temperature or set(unsupported) - {"top_p", "top_k"}):
        name, value = next(iter(unsupported.items()))
        raise ConfigError(
            f"generation_kwargs.{name}={value} of the task is not supported; remove it (until, do_sample, "
            f"temperature and {LENGTHS[0]} are supported)"
        )
    return {
        "stop": [stop] if isinstance(stop, str) else stop,
        "max_new_tokens": lengths[0] if lengths else MAX_NEW_TOKENS,
        "temperature": temperature,
    }


class RequestProgress:
    """Shows the progress of a request with many rows, one bar or line after the other."""

    def __init__(self) -> None:
        self._bar: Progress | None = None

    def __call__(self, unit: str, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = Progress(total, unit=unit).__enter__()
            self._show = self._bar.timed()
        self._show(done)
        if done == total:
            self._bar.__exit__(None, None, None)
            self._bar = None


def evaluate_tasks(
    run: Run, tasks: Sequence[str], *, directory: Path | None = None, limit: int | None = None, shots: int | None = None
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Run lm-eval's tasks on a run.

    Args:
        tasks: names of tasks, groups or tags.
        directory: contains YAML files of further tasks; paths in them are relative to it.
        limit: number of examples of each task, from the first; None: all.
        shots: examples with answers before each question; None: the task's default.

    Returns:
        the step, the metrics by task, and their conditions: versions, numbers of examples and shots, how many contexts
        were truncated; and the examples of each task with the model's answers.

    Raises:
        ConfigError: a task does not exist, or needs something that the model does not support.
        DataError: a task can't be loaded.
    """
    for name in ("lm_eval", "lm-eval", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap would fork a process with threads
    directory = None if directory is None else expand(directory).absolute()
    # Standard output only has the result. Paths of data files in a task are relative to its directory.
    with contextlib.redirect_stdout(sys.stderr), contextlib.chdir(directory or "."):
        manager = task_manager(tasks, directory)
        check_tasks(manager, tasks, directory)
        model = T5LikeLM(run)
        output = lm_eval.simple_evaluate(
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
        "results": output["results"],
        **({"groups": output["groups"]} if output.get("groups") else {}),
        "num_fewshot": output["n-shot"],
        "examples": output["n-samples"],
        "versions": {**output["versions"], "lm_eval": lm_eval.__version__},
        "contexts": {
            "asked": scorer.num_contexts,
            "cut": scorer.num_truncated,
            "tokens_cut": scorer.truncated_tokens,
            "length": scorer.length,
        },
        "answers_shortened": scorer.num_shortened,
    }
    return json.loads(json.dumps(values, default=str)), {
        task: [record(sample) for sample in samples] for task, samples in output["samples"].items()
    }


def record(sample: dict[str, Any]) -> dict[str, Any]:
    """One example as JSON: the document, the reference answer, the model's answer, and the metrics."""
    metrics = {name: sample[name] for name in sample.get("metrics", ())}
    values = {"doc": sample["doc"], "target": sample["target"], "prediction": sample["filtered_resps"], **metrics}
    return json.loads(json.dumps(values, default=str))


def task_manager(tasks: Sequence[str], directory: Path | None) -> TaskManager:
    """The harness's task manager. If the directory has all tasks, lm-eval's own are not listed, which takes long."""
    if directory is None:
        return TaskManager()
    own = TaskManager(include_path=str(directory), include_defaults=False)
    return own if set(tasks) <= set(own.all_tasks) else TaskManager(include_path=str(directory))


def check_tasks(manager: TaskManager, tasks: Sequence[str], directory: Path | None) -> None:
    """Refuse unknown tasks, and tasks whose data are missing, before the model is used."""
    known = [*manager.all_tasks, *manager.all_groups, *manager.all_tags]
    for task in tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, 1)
            where = "" if directory is None else f" or in --tasks_dir={directory}"
            raise ConfigError(
                f"--tasks={task} is not a task of lm-eval {lm_eval.__version__}{where}; use "
                f"{near[0] if near else 'lambada_openai'}"
            )
        try:
            manager.load([task])
        except Exception as error:  # errors in a YAML file can have any type
            reason = one_line(error)
            raise DataError(
                f"--tasks={task} can't be loaded ({type(error).__name__}: {reason}); fix its YAML or data, or allow "
                "downloads with HF_HUB_OFFLINE=0 HF_DATASETS_OFFLINE=0"
            ) from None


def table(values: dict[str, Any]) -> str:
    """The values of `evaluate_tasks` as text."""
    lines = [f"step {values['step']:,}, lm-eval {values['versions']['lm_eval']}"]
    for task, metrics in {**values["results"], **values.get("groups", {})}.items():
        for name, value in metrics.items():
            metric, _, filtered = name.partition(",")
            if filtered and not metric.endswith("_stderr") and isinstance(value, float):
                error = metrics.get(f"{metric}_stderr,{filtered}")
                interval = f" +- {error:.4f}" if isinstance(error, float) else ""
                lines.append(f"{task}  {metric} ({filtered})  {value:.4f}{interval}")
    contexts = values["contexts"]
    if contexts["cut"]:
        lines.append(
            f"{contexts['cut']:,} of {contexts['asked']:,} contexts were truncated from the left to "
            f"{contexts['length']:,} tokens, by {contexts['tokens_cut']:,} tokens in all"
        )
    if values["answers_shortened"]:
        lines.append(
            f"{values['answers_shortened']:,} answers had fewer tokens than requested: the model has no more positions"
        )
    return "\n".join(lines)
