"""Records as inputs and targets, conversations as turns, and errors in both."""

import math

import pytest

from t5like.config.schema import DataConfig
from t5like.data.sources.files import Record
from t5like.data.sources.labels import example_format
from t5like.data.sources.templates import Chat, Part, Templates, inputs_text, render_prompt
from t5like.errors import ConfigError, DataError

SQUAD = {
    "question": "Who?",
    "n": 7,
    "score": 3.5,
    "good": True,
    "answers": {"text": ["Ada", "Lovelace"], "start": [1, 2]},
}


def templates(inputs="{question}", targets="{n}"):
    return Templates(DataConfig(objective=("supervised",), inputs_template=inputs, targets_template=targets))


def chat(messages):
    form = Chat(DataConfig(objective=("supervised",), messages_field="talk"))
    return form.parts(Record({"talk": messages}, "a.jsonl:1"))


def message(role, content):
    return {"role": role, "content": content}


def test_fields_replace_their_names():
    form = templates("q: {question} {{{score}}} {good}", "{answers/text/1} {n}{n}")
    inputs, targets = form.parts(Record(SQUAD, "here"))
    assert inputs == Part("q: Who? {3.5} true", is_target=False)
    assert targets == Part("Lovelace 77", is_target=True)
    assert set(form.required.names) == {"question", "score", "good", "answers", "n"}
    assert inputs_text((inputs, targets)) == inputs.text


def test_values_are_not_expanded_as_templates():
    assert templates().parts(Record({**SQUAD, "question": "{n} {{"}, "here"))[0].text == "{n} {{"


def test_an_example_with_empty_targets_has_no_parts():
    assert templates(targets="{a}").parts(Record({**SQUAD, "a": ""}, "here")) == ()
    assert templates(inputs="{a}").parts(Record({**SQUAD, "a": ""}, "here"))[0].text == ""


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (
            "title",
            "there is no field 'title'; name in data.inputs_template and data.targets_template one of 'question'",
        ),
        (
            "answers/texts/0",
            "a.jsonl:3: there is no field 'texts' in 'answers'; name one of 'text', 'start' in data.targets_template",
        ),
        (
            "answers/text",
            "a.jsonl:3: 'answers/text' is a list, not a text or number; use {answers/text/0} for its first element",
        ),
        ("answers/text/2", "a.jsonl:3: there is no element 2 in 'answers/text', which has 2; remove the example"),
        ("answers/text/first", "a.jsonl:3: 'answers/text' is a list; use {answers/text/0} in data.targets_template"),
        ("answers", "a.jsonl:3: 'answers' is a dict, not a text or number; use {answers/NAME}"),
        ("n/0", "a.jsonl:3: 'n' is a int without fields; shorten {n/0} in data.targets_template"),
        ("none", "a.jsonl:3: 'none' is a NoneType, not a text or number; remove the example"),
        ("nan", "a.jsonl:3: 'nan' is NaN, not a text or a finite number; correct it, or remove the line"),
        ("list/0", "a.jsonl:3: 'list/0' is -Infinity, not a text or a finite number; correct it"),
    ],
)
def test_a_field_that_is_not_text_is_refused_with_its_location(field, message):
    values = {**SQUAD, "none": None, "nan": math.nan, "list": [-math.inf]}
    with pytest.raises(DataError) as refused:
        templates(targets=f"{{{field}}}").parts(Record(values, "a.jsonl:3"))
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("template", ["{", "a } {b}", "{a{b}}", "{}"])
def test_a_lone_brace_is_refused(template):
    with pytest.raises(
        ConfigError, match="data.inputs_template=.* must have fields as {name}; write {{ or }} for a brace"
    ):
        templates(inputs=template)


def test_a_template_without_a_field_is_refused():
    with pytest.raises(ConfigError, match="data.targets_template='yes {{}}' must name a field in braces"):
        templates(targets="yes {{}}")


def test_running_text_has_no_example_format():
    assert example_format(DataConfig()) is None
    assert isinstance(example_format(DataConfig(objective=("supervised",))), Templates)
    assert isinstance(example_format(DataConfig(objective=("supervised",), messages_field="talk")), Chat)


# ---- Conversations ----

TALK = [
    message("system", "Be brief."),
    message("user", "2 + 2?"),
    message("assistant", "4"),
    message("user", "3?"),
    message("assistant", "6"),
    message("user", "Thanks"),
]


def test_assistant_turns_are_targets():
    parts = chat(TALK)
    assert [part.text for part in parts] == ["system: Be brief.", "user: 2 + 2?", "4", "user: 3?", "6", "user: Thanks"]
    assert [part.text for part in parts if part.is_target] == ["4", "6"]
    assert inputs_text(parts) == "system: Be brief.\0user: 2 + 2?"


def test_a_prompt_has_the_text_that_was_trained_on():
    assert render_prompt(TALK[:4]) == [part.text for part in chat(TALK)[:4]]


def test_a_greeting_is_not_a_target():
    assert [part.is_target for part in chat([message("assistant", "Hi"), *TALK[1:3]])] == [False, False, True]


def test_a_conversation_may_be_a_dict_of_lists():
    columns = {key: [each[key] for each in TALK] for key in ("role", "content")}
    assert chat(columns) == chat(TALK)


def test_a_conversation_with_an_empty_answer_has_no_parts():
    assert chat([*TALK[:2], message("assistant", "")]) == ()


@pytest.mark.parametrize(
    ("messages", "rule"),
    [
        ([], "'talk' is an empty list, but must be a list of {\"role\""),
        ("hello", "'talk' is a str, but must be a list"),
        (None, "'talk' is a NoneType, but must be a list"),
        ([*TALK[:2], message("bot", "4")], "message 2 has role='bot'; use system, user, assistant"),
        ([message("user", None)], "message 0 has no text"),
        (["hello"], "message 0 has no text"),
        ({"role": "user", "content": "hi"}, "'talk' is a dict, but must be a list of {\"role\""),
        ({"role": ["user", "assistant"], "content": ["hi"]}, "'talk' is a dict, but must be a list of"),
        (TALK[:2], "has no assistant message after another message, so no targets"),
        ([message("assistant", "Hi")], "has no assistant message after another message"),
    ],
)
def test_what_is_not_a_conversation_is_refused_with_its_location(messages, rule):
    with pytest.raises(DataError) as refused:
        chat(messages)
    assert str(refused.value).startswith("a.jsonl:1: 'talk'") and rule in str(refused.value)
