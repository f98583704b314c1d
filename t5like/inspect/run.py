"""What happened in a run: its config, its starts and their changes, rewinds, bad steps, checkpoints and losses.

`t5like inspect run` prints it. Everything is read from the run directory; nothing is computed.
"""

import json
from pathlib import Path
from typing import Any

from t5like.checkpoint import provenance
from t5like.checkpoint.run_directory import checkpoints_of, config_of
from t5like.config.schema import Config, flatten
from t5like.errors import CheckpointError
from t5like.metrics import writers
from t5like.train.evidence import FOLDER, read_record

LOSSES = 10  # held-out losses that are shown, the last ones


def describe(workdir: Path) -> list[str]:
    """The lines that the command prints.

    Raises:
        CheckpointError, DataError: there is no run, or one of its files can't be read.
    """
    config = config_of(workdir)
    checkpoints = checkpoints_of(workdir, config)
    steps, default = checkpoints.steps(), flatten(Config())
    lines = [f"run        {workdir}"]
    lines += [f"config     {name}={value}" for name, value in flatten(config).items() if value != default[name]]
    for start in starts(workdir):
        lines.append(f"start      {start['time']} after step {start['step']:,}, t5like {start['versions']['t5like']}")
        lines += [f"change     {line}" for line in start.get("changes", ())]
    if steps:
        history = checkpoints.meta(steps[-1]).history
        lines.append(f"saved      steps {', '.join(f'{step:,}' for step in steps)}; {history.rewinds} rewinds")
        lines += [f"rewind     to step {step:,}, over {rows:,} rows" for step, rows in history.rows.passed_over()]
    for step in sorted(int(path.name) for path in (workdir / FOLDER).glob("*") if path.name.isdigit()):
        if record := read_record(workdir, step):
            lines.append(f"bad step   {step:,}: {record['reason']}")
    return [*lines, *losses(workdir)]


def starts(workdir: Path) -> list[dict[str, Any]]:
    """The records of provenance.jsonl, without a last line that was cut off."""
    path = workdir / provenance.FILE
    try:
        text = path.read_text("utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {error}; move it away") from None


def losses(workdir: Path) -> list[str]:
    """The last training loss and the last held-out losses."""
    records = writers.read(workdir)
    trained = [record for record in records if "train/loss" in record]
    evaluated = [record for record in records if record.get("eval/loss") is not None]
    shown = lambda value: "not finite" if value is None else f"{value:.4f}"
    last = [f"loss       {shown(each['train/loss'])} at step {each['step']:,}, training" for each in trained[-1:]]
    return last + [
        f"loss       {shown(each['eval/loss'])} at step {each['step']:,}, held out" for each in evaluated[-LOSSES:]
    ]
