"""The audit of rewards: it says which answers a reward pays that it should not pay."""

import pytest

from t5like.rl.rewards.audit import MOST_ROWS, audit
from t5like.rl.rewards.functions import Length, Regex, TextMetric
from t5like.rl.rewards.reward import ModelReward, Reward

ROWS = [{"inputs": f"What is {number} plus 1?", "targets": str(number + 1)} for number in range(40)]


def warnings(function, rows=ROWS):
    result = audit([Reward("subject", 1.0, function)], rows)
    found = [line for line in result.lines if line.startswith("subject: ")]
    assert result.passed == (not found)
    return found


def test_an_exact_match_has_no_warnings_and_a_readable_table():
    rewards = [Reward("exact_match", 1.0, TextMetric("exact_match", "targets", "en")), ModelReward("run", 1.0, "/r")]
    assert audit(rewards, ROWS) == (
        [
            "reward       right    empty    x        prompt   number",
            "exact_match  1        0        0        0        0",
            "run: a reward model, not audited",
            "no warnings",
        ],
        True,
        [],
    )


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (
            Regex(""),
            [
                "PAYS FOR JUNK: an empty answer gets 1, the right answer 1",
                'PAYS FOR JUNK: "x" gets 1, the right answer 1',
                "PAYS FOR JUNK: the prompt gets 1, the right answer 1",
                'PAYS FOR JUNK: "7919" gets 1, the right answer 1',
            ],
        ),
        (Regex("^[0-9]+$"), ['PAYS FOR JUNK: "7919" gets 1, the right answer 1']),
        (Regex("^1[0-9]?$"), ["THE RIGHT ANSWER DOES NOT GET 1 but 0.55"]),
        (
            Regex("What"),
            [
                "THE RIGHT ANSWER IS NOT THE BEST: it gets 0, another one 1",
                "PAYS FOR JUNK: the prompt gets 1, the right answer 0",
            ],
        ),
        (
            TextMetric("f1", "solution", "en"),
            [
                "FAILS for 100 of 100 rewards; the first: ValueError: the row has no field 'solution'; it has inputs, "
                "targets"
            ],
        ),
    ],
)
def test_a_reward_that_pays_wrongly_is_named(function, expected):
    assert warnings(function) == [f"subject: {line}" for line in expected]


def test_a_reward_that_fails_for_every_answer_is_useless():
    rewards = [
        Reward("no_field", 1.0, TextMetric("f1", "solution", "en")),
        Reward("f1", 1.0, TextMetric("f1", "", "en")),
    ]
    assert audit(rewards[:1], ROWS).useless == ["no_field"]


def test_length_as_a_reward_is_caught():
    assert any("THE RIGHT ANSWER IS NOT THE BEST" in line for line in warnings(Length()))


def test_junk_that_is_right_by_chance_and_rows_without_an_answer_dont_count():
    exact = TextMetric("exact_match", "targets", "en")
    assert warnings(exact, [{"inputs": "x", "targets": "7919"}, {"inputs": "7919", "targets": "x"}]) == []
    result = audit([Reward("subject", 1.0, Regex("^yes$"))], [{"inputs": "?", "targets": ""}] * (MOST_ROWS + 5))
    assert result.lines[1:] == [
        "subject  -        0        0        0        0",
        "20 of 20 rows list no right answer",
        "no warnings",
    ]
