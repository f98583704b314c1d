"""The process of one experiment tracker: reads metrics on standard input and gives them to wandb, mlflow or trackio.

`metrics.trackers` starts it, one per tracker. The first line of input is the description of the run as JSON, each later
one a step: ``[20, {"train/loss": 4.81}]``. A line of output is a message for the user. The process imports the
tracker's package and nothing of JAX. It ends at the end of its input, which is also when the run dies; if its tracker
hangs then, it ends `END_SECONDS` later.

Keys and passwords stay in the environment, where the packages look for them: messages are printed without them.
"""

import json
import os
import queue
import re
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

END_SECONDS = 60.0  # after the end of the input
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)  # in names of variables
SHORTEST_SECRET = 6  # characters; shorter values would hide ordinary words

Log = Callable[[int, Mapping[str, float]], None]
Opened = tuple[Log, Callable[[], None], str]  # a function that logs a step, one that ends the run, its address or ""


# ---- Trackers ----


def open_wandb(run: Mapping[str, Any]) -> Opened:
    """A run of Weights & Biases. A restart continues it by its id; steps may go back."""
    import wandb

    settings = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True)
    names = {"project": run["project"], "name": run["name"], "id": run["id"], "dir": run["directory"]}
    opened = wandb.init(**names, config=run["config"], resume="allow", settings=settings)
    opened.define_metric("step")
    opened.define_metric("*", step_metric="step")
    return lambda step, values: opened.log({"step": step, **values}), opened.finish, getattr(opened, "url", None) or ""


def open_mlflow(run: Mapping[str, Any]) -> Opened:
    """A run of MLflow, at MLFLOW_TRACKING_URI or else in the run directory. A restart finds it by a tag."""
    import mlflow

    if not os.environ.get("MLFLOW_TRACKING_URI"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        mlflow.set_tracking_uri(f"file:{run['directory']}/mlruns")
    experiment = mlflow.set_experiment(run["project"])
    query = f"tags.t5like_id = '{run['id']}'"
    found = mlflow.MlflowClient().search_runs([experiment.experiment_id], filter_string=query, max_results=1)
    if found:
        mlflow.start_run(run_id=found[0].info.run_id)
    else:
        mlflow.start_run(run_name=run["name"], tags={"t5like_id": run["id"]})
        mlflow.log_params({name: str(value)[:500] for name, value in run["config"].items()})
    log = lambda step, values: mlflow.log_metrics({_mlflow_name(name): x for name, x in values.items()}, step=step)
    return log, mlflow.end_run, ""


def _mlflow_name(name: str) -> str:
    """A name that MLflow accepts. Its file store can't have both ``train/loss`` and ``train/loss/source``."""
    group, slash, rest = name.partition("/")
    return re.sub(r"[^\w\-. /]", "_", f"{group}{slash}{rest.replace('/', '.')}")


def open_trackio(run: Mapping[str, Any]) -> Opened:
    """A run of Trackio, in its folder TRACKIO_DIR. A restart continues it by its name."""
    import trackio

    name = f"{run['name']}-{run['id'][:6]}"
    trackio.init(run["project"], name=name, config=run["config"], resume="allow", embed=False)
    return lambda step, values: trackio.log(dict(values), step=step), trackio.finish, ""


OPEN: dict[str, Callable[[Mapping[str, Any]], Opened]] = {
    "wandb": open_wandb,
    "mlflow": open_mlflow,
    "trackio": open_trackio,
}


# ---- The process ----


def without_secrets(text: str) -> str:
    """Text without the values of variables whose names say that they are secret, and without passwords in addresses."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= SHORTEST_SECRET:
            text = text.replace(value, "***")
    return re.sub(r"://[^/@\s]+@", "://***@", text)


def main(name: str) -> None:
    """Serve one run."""
    messages = os.fdopen(os.dup(1), "w")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)

    def say(text: object) -> None:
        messages.write(" ".join(without_secrets(str(text)).split())[:300] + "\n")
        messages.flush()

    lines: queue.Queue[str | None] = queue.Queue()
    header = json.loads(sys.stdin.readline())
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    try:
        log, end, address = OPEN[name](header)
    except Exception as error:
        say(f"it can't be used: {type(error).__name__}: {error}")
        os._exit(1)
    if address:
        say(f"run at {address}")
    failures = 0
    while (line := lines.get()) is not None:
        step, values = json.loads(line)
        try:
            log(step, values)
        except Exception as error:
            failures += 1
            if failures == 1:
                say(f"step {step} was not accepted: {type(error).__name__}: {error}")
    if failures > 1:
        say(f"{failures} steps were not accepted")
    try:
        end()
    except Exception as error:
        say(f"the run can't be ended: {type(error).__name__}: {error}")
    os._exit(0)


def _read(lines: "queue.Queue[str | None]") -> None:
    """Read steps until the end of the input, then end the process if its tracker hangs."""
    for line in sys.stdin:
        lines.put(line)
    lines.put(None)
    threading.Event().wait(END_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
