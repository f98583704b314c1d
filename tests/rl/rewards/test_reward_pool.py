"""Processes that compute rewards: the same values with any number of them, failures that cost one value, no orphans."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from process_tree import descendants

from t5like.config.rl_schema import RLConfig
from t5like.config.schema import Config
from t5like.errors import ConfigError
from t5like.rl.rewards.functions import Regex
from t5like.rl.rewards.pool import RewardPool
from t5like.rl.rewards.reward import Reward, open_rewards

MODULE = """
import os, signal, time

def score(row, answer):
    if answer == "raise": raise RuntimeError("two\\nlines")
    if answer == "exit": raise SystemExit
    if answer == "interrupt": raise KeyboardInterrupt
    if answer == "huge": return 1e30
    if answer == "nan": return float("nan")
    if answer == "infinite": return float("inf")
    if answer == "nothing": return None
    if answer == "text": return "1"
    if answer == "hang": time.sleep(1000)
    if answer == "die": os._exit(0)
    if answer == "killed": os.kill(os.getpid(), signal.SIGKILL)
    if answer == "counted": open("counted", "a").write("x")
    if answer == "print": print("printed")
    if answer == "signals": os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGINT)
    if answer == "change": row["targets"] = "changed"
    return row["number"] + len(answer)
"""
FAILING = ["raise", "exit", "interrupt", "nan", "infinite", "huge", "nothing", "text", "hang", "die", "killed"]
FAILING += ["change"]
GOOD = ["a", "bb", "print", "signals", "", "日本", "c" * 1000, "dd", "e", "f", "ggg", "h"]


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    directory = tmp_path_factory.mktemp("rewards")
    (directory / "scores_of_the_pool.py").write_text(MODULE)
    before = os.getcwd()
    os.chdir(directory)
    yield open_rewards(Config(rl=RLConfig(rewards=("length", "scores_of_the_pool:score"))))
    os.chdir(before)


@pytest.fixture(scope="module")
def pool(rewards):
    with RewardPool(rewards, 2, 1.0) as pool:
        pool.score([{"number": 0}], [["a"]])
        yield pool


def test_a_failure_costs_one_value_and_is_counted_with_its_reward(pool, rewards, capfd):
    before = dict(pool.failures)
    values_RBG = pool.score([{"number": 10}, {"number": 20}], [FAILING, GOOD])
    lengths = np.array([[len(answer) for answer in answers] for answers in (FAILING, GOOD)], np.float64)
    np.testing.assert_array_equal(values_RBG, [lengths, [np.full(len(FAILING), np.nan), 20 + lengths[1]]])
    assert pool.failures["length"] == before["length"] == 0
    assert pool.failures["scores_of_the_pool.score"] - before["scores_of_the_pool.score"] == len(FAILING)
    assert pool.first_failures == {"scores_of_the_pool.score": "RuntimeError: two lines"}
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("hang", "TimeoutError: no value after rl.reward_timeout_seconds=0.3"),
        ("die", "its process ended with exit code 0"),
        ("killed", "its process ended with signal 9"),
        ("interrupt", "KeyboardInterrupt"),
        ("nan", "ValueError: the reward is nan"),
        ("huge", "ValueError: the reward is 1e+30, more than 1e20"),
        ("text", "TypeError: the reward is a str, not a number"),
        ("nothing", "TypeError: the reward is a NoneType, not a number"),
    ],
)
def test_the_first_failure_says_what_happened(rewards, answer, reason):
    with RewardPool(rewards[1:], 1, 0.3, failed="zero") as pool:
        assert pool.score([{"number": 1}], [[answer, "ok"]]).tolist() == [[[0.0, 3.0]]]
        assert pool.first_failures == {"scores_of_the_pool.score": reason}


def test_a_pattern_that_backtracks_for_ever_is_a_failure():
    with RewardPool([Reward("regex", 1.0, Regex("(a+)+$"))], 1, 0.3) as pool:
        np.testing.assert_array_equal(pool.score([{}], [["a" * 40 + "b", "aaa"]]), [[[np.nan, 1.0]]])


def test_values_dont_depend_on_the_number_of_processes(rewards, pool):
    rows = [{"number": number} for number in range(30)]
    answers = [["x" * ((7 * row + place) % 11) for place in range(8)] for row in range(30)]
    with RewardPool(rewards, 1, 10.0) as alone:
        np.testing.assert_array_equal(alone.score(rows, answers), pool.score(rows, answers))
    expected = [[number["number"] + len(text) for text in texts] for number, texts in zip(rows, answers, strict=True)]
    np.testing.assert_array_equal(pool.score(rows, answers)[1], expected)


def test_equal_answers_to_equal_rows_are_scored_once(pool, rewards):
    rows, answers = [{"number": 1}, {"number": 2}, {"number": 1}], [["counted", "nan", "counted"]] * 3
    before = pool.failures[rewards[1].name]
    values_RBG = pool.score(rows, answers)
    np.testing.assert_array_equal(values_RBG[1], [[8, np.nan, 8], [9, np.nan, 9], [8, np.nan, 8]])
    assert Path("counted").read_text() == "xx"
    assert pool.failures[rewards[1].name] - before == 3


def test_no_prompts_and_no_rewards_give_empty_arrays(pool):
    assert pool.score([], []).shape == (2, 0, 0)
    with RewardPool([], 1, 1.0) as empty:
        assert empty.score([{}], [["a", "b"]]).shape == (0, 1, 2)
    with pytest.raises(ValueError, match="2 rows need as many lists of answers, of equal length"):
        pool.score([{}, {}], [["a"], ["a", "b"]])


def test_processes_that_cant_start_are_refused(rewards):
    Path("scores_of_the_pool.py").rename("hidden.py")
    try:
        with RewardPool(rewards, 1, 1.0) as pool, pytest.raises(ConfigError, match="can't start .*ModuleNotFoundError"):
            pool.score([{"number": 1}], [["a"]])
    finally:
        Path("hidden.py").rename("scores_of_the_pool.py")


PROGRAM = """
import os, sys, time
from t5like.rl.rewards.pool import RewardPool
from t5like.rl.rewards.python_tests import PythonTests
from t5like.rl.rewards.functions import Length
from t5like.rl.rewards.reward import Reward
assert "jax" not in sys.modules
with RewardPool([Reward("tests", 1.0, PythonTests("tests", 100.0))], 2, 100.0) as pool:
    pool.score([{"tests": "assert x == 1"}], [["x = 1"]])
    print("ready", flush=True)
    loop = "import os, time\\nif not os.fork(): os.setsid()\\nos.fork()\\ntime.sleep(1000)"
    if "end" not in sys.argv:
        pool.score([{"tests": "assert x == 1"}], [[f"{loop} + {i}" for i in range(4)]])
"""


@pytest.mark.parametrize("end", ["exit", signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_pools_process(end):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *(["end"] if end == "exit" else [])], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    below, until = descendants(process.pid), time.monotonic() + 30
    if end != "exit":
        while len(below := descendants(process.pid)) < 16 and time.monotonic() < until:
            time.sleep(0.05)
        assert len(below) >= 16
        process.send_signal(end)
    assert process.wait(60) == (0 if end == "exit" else -end)
    process.stdout.close()
    while (left := [pid for pid in below if is_running(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    assert left == []


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
