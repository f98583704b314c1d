"""Small supervised tasks, most of them from the running Python's standard library, as one TFDS builder.

They exercise every use of a fine-tuned model offline. Each task is real but small: a score shows that the path works
and what a model of this size can do, nothing about public benchmarks. `source` opens ``task:NAME``, and
configs/task_NAME.py trains on it.

A function, docstring, paragraph or expression gives at most one example, and inputs are not repeated, so no held-out
example shares its context with a training example. Everything is read from the syntax tree: nothing is imported or run.
Texts have maximum lengths in characters; longer ones are left out, never truncated.
"""

import ast
import dataclasses
import functools
import itertools
import re
import sys
import zlib
from collections import deque
from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import Any

import tensorflow_datasets as tfds

from t5like.data.sources.label_tasks import complexity, name_labels
from t5like.data.sources.python_expressions import gloss
from t5like.data.sources.python_stdlib import modules
from t5like.data.sources.small_functions import examples as small_function_examples

LARGEST = 8_000  # examples of a task; if there are more, those with the smallest hashes are kept
LABELS = ("asyncio", "email", "importlib", "logging", "multiprocessing", "tkinter", "unittest", "xml")
LONGEST_BODY = 20  # lines
_Example = tuple[str, dict[str, Any]]  # a unique key, and the features


@dataclasses.dataclass(frozen=True)
class Function:
    """A function or method of the library.

    Attributes:
        file: its file, relative to the library.
        line: of its def, from 1.
        name: inside its module, such as ``TextWrapper.fill``.
        arguments: its parameters as the syntax tree has them.
        signature: such as ``def fill(self, text)``, without decorators.
        summary: the docstring's first sentence, or "".
        body: its statements without docstring and comments, indented by 0; "" if it is long or does nothing.
    """

    file: str
    line: int
    name: str
    arguments: ast.arguments
    signature: str
    summary: str
    body: str

    @property
    def key(self) -> str:
        return f"{self.file}:{self.line}:{self.name}"

    @property
    def heading(self) -> str:
        """The signature under its dotted name, such as ``TextWrapper.fill(self, text)``."""
        return self.name + self.signature[self.signature.index("(") :]


@dataclasses.dataclass
class Library:
    """The material of all tasks; lists are in the order of the files."""

    functions: list[Function] = dataclasses.field(default_factory=list)
    docstrings: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # (key, text)
    expressions: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)  # (key, code, reading)


# ---- The builder ----


class Tasks(tfds.core.GeneratorBasedBuilder):
    """Small supervised tasks on Python's standard library.

    Each example has the texts `inputs` and `targets`, of `small_functions` also `tests` and `rejected`; of `dialogue`,
    it has `messages`, a sequence of `role` (user or assistant, in turn) and `content`, which reads back as a dict of
    two lists of equal length.
    """

    # Contains the Python version, so that another Python builds another data set.
    VERSION = tfds.core.Version(f"1.{sys.version_info.major}{sys.version_info.minor:02}.{sys.version_info.micro}")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = {"inputs": text, "targets": text}
        if self.builder_config.name == "small_functions":
            features |= {"tests": text, "rejected": text}
        if self.builder_config.name == "dialogue":
            features = {"messages": tfds.features.Sequence({"role": text, "content": text})}
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.builder_config.description}\n\n{self.__doc__}",
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[_Example]:
        yield from examples(self.builder_config.name)


def examples(name: str) -> list[_Example]:
    """(unique key, features) of each example of the task `name`, the same ones in the same order each time."""
    by_inputs = {}
    material = Library() if name == "small_functions" else library()
    for key, example in TASKS[name](material):
        by_inputs.setdefault(str(example.get("inputs", example.get("messages"))), (key, example))
    return sorted(by_inputs.values(), key=lambda pair: (_hash(pair[0]), pair[0]))[:LARGEST]


# ---- The tasks ----


def code_generation(library: Library) -> Iterator[_Example]:
    """Signature and first sentence of the docstring -> the function's body."""
    for function in library.functions:
        if function.summary and function.body and len(function.body) <= 200:
            scope, _, _ = function.name.rpartition(".")
            lines = [f"class {part}:" for part in scope.split(".") if part]
            lines += [function.signature + ":", f'"""{function.summary}"""']
            prompt = "\n".join(" " * 4 * depth + line for depth, line in enumerate(lines))
            if len(prompt) <= 300 and not re.search(r'["\\]', function.summary) and function.body not in prompt:
                yield function.key, {"inputs": prompt, "targets": function.body}


def summarization(library: Library) -> Iterator[_Example]:
    """A function without docstring and comments -> the first sentence of its docstring."""
    for function in library.functions:
        if function.body and len(function.summary.split()) >= 3 and len(function.summary) <= 120:
            source = function.signature + ":\n" + "\n".join("    " + line for line in function.body.split("\n"))
            if len(source) <= 500 and function.summary.lower() not in source.lower():
                yield function.key, {"inputs": source, "targets": function.summary}


def question_answering(library: Library) -> Iterator[_Example]:
    """A question about a function's parameters, and its signature -> the answer, in the form of SQuAD in T5.

    The form is that of Raffel et al. 2020, appendix D.15. Names and defaults are found in the context; numbers, yes and
    no are not.
    """
    for function in library.functions:
        by_type = questions(function.arguments)
        if len(function.heading + function.summary) <= 250 and len(by_type) > 1:
            _, (question, answer) = _pick(by_type, function.key)
            context = f"{function.heading} {function.summary}".strip()
            yield function.key, {"inputs": f"question: {question} context: {context}", "targets": answer}


def classification(library: Library) -> Iterator[_Example]:
    """A docstring's first paragraph -> the package that it is from, one of `LABELS`, where it does not name it."""
    for key, text in library.docstrings:
        label = key.partition("/")[0]
        paragraph = " ".join(text.split("\n\n")[0].split())
        if label in LABELS and 20 <= len(paragraph) <= 400 and label not in paragraph.lower():
            yield key, {"inputs": paragraph, "targets": label}


def regression(library: Library) -> Iterator[_Example]:
    """A function without docstring and comments -> its cyclomatic complexity."""
    for function in library.functions:
        if function.body and len(function.body) <= 400:
            yield function.key, {"inputs": function.body, "targets": str(complexity(function.body))}


def token_classification(library: Library) -> Iterator[_Example]:
    """The tokens of a Python expression -> what each name in it is: called, a value, the name of an argument."""
    first = {}  # to label only what `examples` keeps
    for key, code, _ in library.expressions:
        first.setdefault(code, key)
    for code, key in sorted(first.items(), key=lambda pair: (_hash(pair[1]), pair[1]))[: LARGEST + 1000]:
        words, labels = name_labels(code)
        if labels:
            yield key, {"inputs": " ".join(words), "targets": " ".join(labels)}


def translation(library: Library) -> Iterator[_Example]:
    """A Python expression -> its reading in English, word by word, with the word order of English.

    There is no parallel text of two human languages on every machine. `gloss` is a rule and so has one right answer,
    which can be read back: a model has to find the structure and to move what it names.
    """
    for key, code, reading in library.expressions:
        yield key, {"inputs": code, "targets": reading}


def dialogue(library: Library) -> Iterator[_Example]:
    """A conversation of three questions about one function: what it does, then two about its parameters."""
    for function in library.functions:
        by_type = questions(function.arguments)
        if function.summary and len(function.heading + function.summary) <= 250 and len(by_type) > 1:
            first_type, first = _pick(by_type, function.key)
            _, second = _pick({name: by_type[name] for name in by_type if name != first_type}, function.key)
            turns = ((f"Here is {function.heading}. What does it do?", function.summary), first, second)
            messages = [
                {"role": role, "content": content}
                for turn in turns
                for role, content in zip(("user", "assistant"), turn, strict=True)
            ]
            yield function.key, {"messages": messages}


def text_generation(library: Library) -> Iterator[_Example]:
    """The first sentence of a paragraph of documentation -> its next ones, up to 200 characters."""
    texts = [*library.docstrings, *((f"topic/{name}", topics[name]) for name in sorted(topics))]
    for key, text in texts:
        for number, paragraph in enumerate(re.split(r"\n\s*\n", text)):
            first, *rest = sentences(paragraph)
            following = ""
            for sentence in rest:
                if len(following) + len(sentence) >= 200:
                    break
                following = f"{following} {sentence}".strip()
            if 20 <= len(first) <= 200 and first[0].isalpha() and len(following) >= 20 and following not in first:
                yield f"{key}/{number}", {"inputs": first, "targets": following}


def small_functions(_: Library) -> Iterator[_Example]:
    """What a small function does -> the function; unit tests are in the field `tests`."""
    yield from small_function_examples()


TASKS = {
    "code_generation": code_generation,
    "summarization": summarization,
    "question_answering": question_answering,
    "classification": classification,
    "translation": translation,
    "dialogue": dialogue,
    "text_generation": text_generation,
    "small_functions": small_functions,
    "regression": regression,
    "token_classification": token_classification,
}
NAMES: tuple[str, ...] = tuple(TASKS)
Tasks.BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name, description=task.__doc__) for name, task in TASKS.items()]


# ---- Questions and sentences ----


def questions(arguments: ast.arguments) -> dict[str, list[tuple[str, str]]]:
    """Questions about a function's parameters with their answers, by type of question.

    Starred parameters don't count, `self` does. Whether one is required is asked only if another is optional.
    """
    positional = [*arguments.posonlyargs, *arguments.args]
    names = [each.arg for each in (*positional, *arguments.kwonlyargs)]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults + arguments.kw_defaults
    free = [(name, default) for name, default in zip(names, defaults, strict=True) if name not in ("self", "cls")]
    values = [(name, ast.unparse(default)) for name, default in free if default]
    stars = [("positional", arguments.vararg), ("keyword", arguments.kwarg)]
    by_type = {
        "count": [("How many parameters are there?", str(len(names)))] if free else [],
        "next": [(f"Which parameter comes after {name}?", after) for name, after in itertools.pairwise(names)],
        "required": [(f"Must {name} be given?", "no" if default else "yes") for name, default in free if any(defaults)],
        "default": [(f"What is the default of {name}?", value) for name, value in values if len(value) <= 30],
        "star": [(f"What takes further {argument_type} arguments?", star.arg) for argument_type, star in stars if star],
    }
    return {name: pairs for name, pairs in by_type.items() if pairs}


def sentences(text: str) -> list[str]:
    """The sentences of a paragraph, each on one line; at least one, which may be empty."""
    return re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(text.split()))


def _pick(by_type: dict[str, list[tuple[str, str]]], key: str) -> tuple[str, tuple[str, str]]:
    """A type of question and one question of it, by the hash of `key`; all types are equally likely."""
    turn, position = divmod(_hash(key), len(by_type))
    question_type = list(by_type)[position]
    return question_type, by_type[question_type][turn % len(by_type[question_type])]


def _hash(key: str) -> int:
    return zlib.crc32(key.encode())


# ---- The library ----


@functools.cache
def library() -> Library:
    """Parse the running Python's standard library, once per process; takes some seconds."""
    collected, read = Library(), {}
    for file, source, tree in modules():
        _collect(collected, tree, file, "")
        lines = source.split("\n")
        for children in _children_of_statements(tree):
            collected.expressions += _readings(children, file, lines, read)
    return collected


def _collect(collected: Library, parent: ast.AST, file: str, scope: str) -> None:
    """Add the functions and docstrings of a module or class, and of the classes inside it."""
    if text := ast.get_docstring(parent):
        collected.docstrings.append((f"{file}:{getattr(parent, 'lineno', 0)}", text))
    for child in parent.body:
        if isinstance(child, ast.ClassDef):
            _collect(collected, child, file, f"{scope}{child.name}.")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(child) or ""
            if text:
                collected.docstrings.append((f"{file}:{child.lineno}", text))
            word = "def" if isinstance(child, ast.FunctionDef) else "async def"
            signature = f"{word} {child.name}({ast.unparse(child.args)})"
            summary = sentences(text.split("\n\n")[0])[0]
            body = _body(child) if summary else ""  # no task shows the body of a function without a summary
            function = Function(file, child.lineno, scope + child.name, child.args, signature, summary, body)
            collected.functions.append(function)


def _body(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    statements = function.body[1:]  # behind the docstring
    dots = lambda each: isinstance(each, ast.Expr) and getattr(each.value, "value", None) is ...
    useless = all(isinstance(each, ast.Pass | ast.Raise) or dots(each) for each in statements[:1])
    if useless or function.end_lineno - statements[0].lineno > LONGEST_BODY:
        return ""
    return "\n".join(map(ast.unparse, statements))


def _children_of_statements(module: ast.Module) -> Iterator[list[ast.AST]]:
    """The children of each statement, in the order of `ast.walk`, which would visit all parts of expressions too."""
    waiting = deque([module])
    while waiting:
        node = waiting.popleft()
        children = list(ast.iter_child_nodes(node))
        waiting += (child for child in children if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case))
        if isinstance(node, ast.stmt):
            yield children


def _readings(
    children: list[ast.AST], file: str, lines: list[str], read: dict[str, tuple[str, str]]
) -> Iterator[tuple[str, str, str]]:
    """(key, code, reading) of the short expressions among the children of a statement.

    Args:
        read: (code, reading) by the source of an expression; a third of them occur again.
    """
    for tree in children:
        if (
            isinstance(tree, ast.expr)
            and tree.lineno == tree.end_lineno
            and isinstance(getattr(tree, "ctx", None), ast.Load | None)
            and 8 <= tree.end_col_offset - tree.col_offset <= 60
        ):
            line = lines[tree.lineno - 1]
            source = line[tree.col_offset : tree.end_col_offset] if line.isascii() else ast.unparse(tree)  # else bytes
            if source not in read:
                reading = gloss(tree)
                fits = 5 <= len(reading.split()) <= 30
                read[source] = (ast.unparse(tree), reading) if fits else ("", "")
            code, reading = read[source]
            if code:
                yield f"{file}:{tree.lineno}:{tree.col_offset}", code, reading
