"""The pages of `t5like inspect` in a real browser: headless Chromium, light and dark, on a wide screen and a phone.

`make browser` installs Chromium and runs this. A page is built by the command, opened from its file, and judged by the
document that the browser made of it and by a screenshot. `SHOTS=DIR` keeps the screenshots there.
"""

import dataclasses
import json
import math
import os
import shutil
import subprocess

import numpy as np
import pytest
from matplotlib.image import imread

from t5like.config import loader

EDGE = 6  # columns of pixels at the right that must be empty: nothing is wider than the page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A function that starts Chromium on a page with some flags; returns its standard output."""
    profile = tmp_path_factory.mktemp("profile")
    flags = [
        "--headless",
        "--no-sandbox",  # needed for root
        "--disable-gpu",
        "--hide-scrollbars",
        "--no-first-run",
        f"--user-data-dir={profile}",
    ]

    def start(page, *more) -> str:
        command = ["chromium", *flags, *more, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    return start


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    """A run whose loss rose at the end, with a source whose name looks like HTML."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    workdir.mkdir()
    config = loader.load("tiny")
    train = dataclasses.replace(config.train, num_steps=400, checkpoint_every=400)
    (workdir / "config.json").write_text(loader.to_json(dataclasses.replace(config, train=train)))
    records = [{"step": 0, "baseline/uniform": 8.3, "baseline/unigram": 6.5, "eval/loss": 8.4}]
    for step in range(10, 401, 10):
        loss = 2 + 6 / math.sqrt(step) + (2 if step > 330 else 0)
        records.append(
            {
                "step": step,
                "train/loss": loss,
                "train/loss/source/<b>bold</b>": loss,
                "train/loss/source/other": loss + 0.5,
                "train/grad_norm": 1.0 + 0.1 * math.sin(step),
                "train/learning_rate": 0.01,
                "train/tokens_per_second": 1000.0 + step,
                "train/step_seconds": 0.1,
                "time/device": 0.8,
                "time/data": 0.1,
                **({"eval/loss": loss + 0.2} if step % 100 == 0 else {}),
            }
        )
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return workdir


def pixels(browser, page, name, size, *flags):
    """A screenshot as an array [height, width, 3], 0 to 1."""
    picture = page.parent / name
    browser(page, f"--screenshot={picture}", f"--window-size={size[0]},{size[1]}", *flags)
    if shots := os.environ.get("SHOTS"):
        shutil.copy(picture, shots)
    array = imread(picture)[..., :3]
    assert array.shape[:2] == (size[1], size[0])
    return array


def check(array, *, dark: bool) -> None:
    """The background has the right brightness, something is drawn, and nothing is cut off at the right."""
    background = array[2, 2]
    assert (background.mean() < 0.3) == dark
    differs = np.abs(array - background).max(-1) > 0.1
    assert 0.01 < differs.mean() < 0.7
    assert len(np.unique((array[differs] * 15).astype(int), axis=0)) > 20  # colours
    assert not differs[:, -EDGE:].any()


def test_the_page_of_a_run_is_drawn(browser, run_directory, command, tmp_path):
    page = tmp_path / "run.html"
    assert command("inspect", "run", f"--workdir={run_directory}", f"--html={page}")[0] == 0
    document = browser(page, "--dump-dom")
    assert "the training loss rose from" in document and "Training loss by source" in document
    assert document.count("<polyline") > 8 and "<b>" not in document and "&lt;b&gt;bold" in document
    check(pixels(browser, page, "run.png", (1200, 1800)), dark=False)
    check(pixels(browser, page, "run_phone_dark.png", (500, 2400), "--force-dark-mode"), dark=True)


def test_the_page_of_the_data_is_drawn(browser, flags, command, tmp_path):
    page = tmp_path / "data.html"
    code, _, err = command("inspect", "data", *flags, "--rows=2", f"--html={page}")
    assert code == 0, err
    document = browser(page, "--dump-dom")
    assert "extra_id_0" in document and "<svg" in document
    check(pixels(browser, page, "data_dark.png", (1200, 1800), "--force-dark-mode"), dark=True)
    check(pixels(browser, page, "data_phone.png", (500, 2400)), dark=False)
