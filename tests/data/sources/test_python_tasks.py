"""The offline tasks: deterministic, large enough, without leaks, and each consistent with its own rule."""

import ast
import contextlib
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from shared_directories import made_once
from small_library import small_library

from t5like.config import loader
from t5like.data.sources import python_tasks
from t5like.data.sources.python_expressions import gloss
from t5like.data.sources.python_tasks import LABELS, LARGEST, NAMES, Tasks, examples, library
from t5like.evaluation.text_metrics import majority_baseline

COPIES = ("question_answering", "dialogue", "regression")  # targets may occur in the inputs
FILES = Path(__file__).parents[3] / "configs"
IMPORTABLE = ("textwrap", "json/decoder", "shutil", "difflib", "statistics", "logging/__init__", "fractions", "heapq")


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    """examples.json: the examples of all tasks, [key, features]; docstrings.json: those of the library."""

    def make(directory: Path) -> None:
        for name, value in (
            ("docstrings", library().docstrings),
            ("examples", {name: examples(name) for name in NAMES}),
        ):
            (directory / f"{name}.json").write_text(json.dumps(value))

    return made_once(tmp_path_factory, "tasks", make)


@pytest.fixture(scope="session")
def made(files) -> dict[str, list]:
    return json.loads((files / "examples.json").read_text())


@pytest.fixture
def texts(made):
    return lambda name: [(example["inputs"], example["targets"]) for _, example in made[name]]


@pytest.mark.parametrize("name", NAMES)
def test_there_are_enough_examples_and_all_inputs_differ(name, made):
    keys, features = zip(*made[name], strict=True)
    assert 2000 <= len(keys) <= LARGEST and len(set(keys)) == len(keys)
    assert max(Counter(str(each.get("inputs", each.get("messages"))) for each in features).values()) == 1


@pytest.mark.parametrize("name", [name for name in NAMES if name not in COPIES])
def test_no_target_is_contained_in_its_inputs(name, texts):
    for inputs, targets in texts(name):
        assert targets.strip() and targets not in inputs, inputs


def test_another_process_makes_the_same_examples_in_the_same_order(made, tmp_path, monkeypatch):
    """Of a part of the library, of which each task leaves something out, and of all small functions."""
    program = "import json, sys, sysconfig; sysconfig.get_path = lambda _: sys.argv[1]; "
    program += "from t5like.data.sources import python_tasks as tasks; small = tasks.examples('small_functions'); "
    program += "tasks.LARGEST = 20; examples = {name: tasks.examples(name) for name in tasks.NAMES}; "
    program += "json.dump({**examples, 'small_functions': small}, sys.stdout)"
    monkeypatch.setattr(python_tasks, "LARGEST", 20)
    with small_library(tmp_path / "library") as directory:
        here = {name: examples(name) for name in NAMES}
        command = [sys.executable, "-c", program, directory]
        other = subprocess.check_output(command, env={**os.environ, "PYTHONHASHSEED": "7"}, text=True)
    assert min(map(len, here.values())) == 20
    assert json.loads(other) == {**json.loads(json.dumps(here)), "small_functions": made["small_functions"]}


@pytest.mark.parametrize("name", ["translation", "dialogue"])
def test_a_task_is_a_tfds_data_set_read_without_tensorflow(name, tmp_path):
    tfds.disable_progress_bar()
    with small_library(tmp_path / "library"):
        builder = Tasks(config=name, data_dir=tmp_path, file_format="array_record")
        with contextlib.redirect_stdout(None):
            builder.download_and_prepare()
        records = [flat(record) for record in builder.as_data_source(split="train")]
        assert sorted(records) == sorted(flat(example) for _, example in examples(name)) and len(records) > 50
    assert "tensorflow" not in sys.modules


def flat(example):
    """The texts of an example, generated or read from TFDS: bytes, and a list for each part of a message."""
    if "inputs" in example:
        parts = [[example["inputs"]], [example["targets"]]]
    elif isinstance(messages := example["messages"], dict):
        parts = [messages["role"], messages["content"]]
    else:
        parts = [[each["role"] for each in messages], [each["content"] for each in messages]]
    return [[text.decode() if isinstance(text, bytes) else text for text in part] for part in parts]


def test_prompt_and_body_are_one_python_definition(texts):
    for prompt, body in texts("code_generation"):
        depth = prompt.split("\n")[-1].index('"')
        [definition] = ast.parse(prompt + "\n" + textwrap.indent(body, " " * depth)).body
        while isinstance(definition, ast.ClassDef):
            [definition] = definition.body
        assert ast.get_docstring(definition) and len(definition.body) > 1, prompt


def test_a_function_that_is_summarized_parses_and_has_no_docstring(texts):
    for source, summary in texts("summarization"):
        assert ast.get_docstring(ast.parse(source).body[0]) is None and "\n" not in summary


def answer(question, function):
    """The answer to a question about a real function, by `inspect`."""
    parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    named = [each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    names = [each.name for each in named]
    match question.rstrip("?").split():
        case ["How", "many", *_]:
            return len(named)
        case ["Which", *_, name]:
            return names[names.index(name) + 1]
        case ["Must", name, *_]:
            return "yes" if named[names.index(name)].default is inspect.Parameter.empty else "no"
        case ["What", "takes", _, kind, _]:
            return next(each.name for each in parameters if each.kind.name == f"VAR_{kind.upper()}")
        case ["What", "is", *_, name]:
            return named[names.index(name)].default
    raise AssertionError(question)


def real_function(key):
    """The function behind a key such as ``textwrap.py:300:TextWrapper.fill``; None for a property or similar."""
    file, line, name = key.split(":")
    if (module := file.removesuffix(".py")) not in IMPORTABLE:
        return None
    value = importlib.import_module(module.removesuffix("/__init__").replace("/", "."))
    for part in name.split("."):
        value = inspect.getattr_static(value, part, None)
    value = getattr(value, "__func__", value)  # of class and static methods
    is_it = inspect.isfunction(value) and 0 <= int(line) - value.__code__.co_firstlineno < 5
    return value if is_it and not hasattr(value, "__wrapped__") else None


def is_right(target, function, question):
    fact = answer(question, function)
    if not question.startswith("What is the default"):
        return target == str(fact)
    return eval(target, function.__globals__) == fact or repr(fact) == target  # noqa: S307


def test_answers_are_true_of_the_real_functions(made):
    checked = Counter()
    for key, example in made["question_answering"]:
        if function := real_function(key):
            question = re.match(r"question: (.*?\?) context: ", example["inputs"])[1]
            assert is_right(example["targets"], function, question), example
            checked[question.split()[0] + question.split()[1]] += 1
    assert len(checked) >= 4 and checked.total() >= 60, checked


def test_roles_alternate_in_conversations_and_their_facts_are_true(made):
    checked = 0
    for key, example in made["dialogue"]:
        messages = example["messages"]
        assert [each["role"] for each in messages] == ["user", "assistant"] * 3
        contents = [each["content"] for each in messages]
        assert contents[2] != contents[4] and all(contents)
        if function := real_function(key):
            assert contents[1].split()[0] in function.__doc__
            assert is_right(contents[3], function, contents[2]) and is_right(contents[5], function, contents[4]), key
            checked += 1
    assert checked >= 60


def test_labels_are_many_and_not_named_and_none_has_a_majority(texts):
    pairs = texts("classification")
    counts = Counter(label for _, label in pairs)
    assert set(counts) == set(LABELS) and min(counts.values()) >= 50
    assert counts[majority_baseline([label for _, label in pairs])] < len(pairs) / 2
    assert not any(label in text.lower() for text, label in pairs)


def test_small_functions_pass_their_tests_and_no_constant_passes_most_of_them(made):
    for _, example in made["small_functions"][::4]:
        names = {}
        exec(example["targets"], names)  # noqa: S102
        exec(example["tests"], names)  # noqa: S102
        results = [line.partition(" == ")[2] for line in example["tests"].split("\n")]
        assert len(results) == 5 and max(Counter(results).values()) <= 3, example


def test_rejected_small_functions_are_wrong_and_have_the_lengths_of_the_right_ones(made):
    texts = [example for _, example in made["small_functions"]]
    for example in texts:
        exec(example["rejected"], names := {})  # noqa: S102
        with pytest.raises(AssertionError):
            exec(example["tests"], names)  # noqa: S102
    assert sorted(each["rejected"] for each in texts) == sorted(each["targets"] for each in texts)
    longer = [len(each["targets"]) > len(each["rejected"]) for each in texts]
    assert 0.4 < sum(longer) / len(texts) < 0.55  # the others: equal, or shorter


def test_targets_of_text_generation_follow_the_inputs_in_the_documentation(made, files):
    docstrings = json.loads((files / "docstrings.json").read_text())
    words = " ".join(" ".join(text.split()) for _, text in docstrings)
    from_docstrings = [example for key, example in made["text_generation"] if not key.startswith("topic/")]
    assert len(from_docstrings) > 1000
    for example in from_docstrings[:300]:
        assert f"{example['inputs']} {example['targets']}" in words


@pytest.mark.parametrize("name", NAMES)
def test_every_task_has_a_config_with_its_metrics(name):
    config = loader.load(FILES / f"task_{name}.py")
    assert config.data.source == (f"task:{name}",) and config.data.objective in (("supervised",), (name,))
    assert config.evaluate.metrics and loader.from_json(loader.to_json(config)) == config
    assert config.evaluate.answer_choices == (LABELS if name == "classification" else ())
    assert config.data.messages_field == ("messages" if name == "dialogue" else "")
    assert config.evaluate.max_new_tokens <= config.data.targets_length


# ---- Translation: a reading that can be read back has lost nothing ----

INFIX = {
    "equals": "==", "differs from": "!=", "is less than": "<", "is at most": "<=", "is more than": ">",
    "is at least": ">=", "is the same as": "is", "is other than": "is not", "is in": "in", "is not in": "not in",
}  # fmt: skip
OPERATORS = {"sum": "+", "difference": "-", "product": "*", "quotient": "/", "remainder": "%", "power": "**"}


class Reader:
    """A recursive-descent parser from the words of a reading to a Python expression with all brackets."""

    def __init__(self, reading):
        self.words = reading.split()

    def take(self, *expected):
        assert self.words[: len(expected)] == list(expected), (expected, self.words)
        del self.words[: len(expected)]
        return True

    def has(self, text):
        return self.words[: len(text.split())] == text.split() and self.take(*text.split())

    def many(self, read):
        number, _ = int(self.words.pop(0)), self.words.pop(0)
        return [read() for position in range(number) if position == 0 or self.take("and")]

    def pair(self, middle):
        first = self.read()
        self.take(middle)
        return first, self.read()

    def argument(self):
        if self.words[1:3] == ["set", "to"]:
            name, _, _ = (self.words.pop(0) for _ in range(3))
            return f"{name}={self.read()}"
        return self.read()

    def read(self):
        if self.has("the result of"):
            function = self.read()
            given = [] if self.has("alone") else self.take("with") and self.many(self.argument)
            return f"{function}({', '.join(given)})"
        if self.has("the item"):
            index, value = self.pair("in")
            return f"{value}[{index}]"
        if self.has("the part"):
            first, last = self.read() if self.has("from") else "", self.read() if self.has("to") else ""
            self.take("in")
            return f"{self.read()}[{first}:{last}]"
        if self.has("the list of"):
            return f"[{', '.join(self.many(self.read))}]"
        if self.has("the tuple of"):
            return f"({', '.join(self.many(self.read))},)"
        for kind, code in {"list": "[]", "tuple": "()", "dict": "{}"}.items():
            if self.has(f"the empty {kind}"):
                return code
        for word, sign in OPERATORS.items():
            if self.has(f"the {word} of"):
                return f"({f' {sign} '.join(self.pair('and'))})"
        if self.has("whether"):
            left = self.read()
            sign = next(sign for words, sign in INFIX.items() if self.has(words))
            return f"({left} {sign} {self.read()})"
        if self.has("both"):
            return f"({' and '.join(self.pair('and'))})"
        if self.has("either"):
            return f"({' or '.join(self.pair('or'))})"
        if self.has("not"):
            return f"(not {self.read()})"
        if self.has("minus"):
            return f"(-{self.read()})"
        if self.has("if"):
            condition, then = self.pair("then")
            self.take("else")
            return f"({then} if {condition} else {self.read()})"
        word = self.words.pop(0)
        return f"{self.read()}.{word}" if word.isidentifier() and self.has("of") else word


def test_every_reading_can_be_parsed_back(texts):
    for code, reading in texts("translation"):
        reader = Reader(reading)
        assert ast.unparse(ast.parse(reader.read(), mode="eval")) == code and not reader.words, reading


@pytest.mark.parametrize(
    "code, reading",
    [
        ("a.b.c", "c of b of a"),
        ("len(a.b[i]) > 0", "whether the result of len with 1 argument the item i in b of a is more than 0"),
        ("x if not y else -1", "if not y then x else minus 1"),
        ("f(**x)", ""),
        ("[y for y in x]", ""),
        ("a < b < c", ""),
        ("'two words'", ""),
    ],
)
def test_readings_of_expressions(code, reading):
    assert gloss(ast.parse(code, mode="eval").body) == reading
