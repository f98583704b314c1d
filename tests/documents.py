"""Finds what the documents name: commands, files, flags. `test_documents.py` checks each of them.

Documents are the Markdown files, the docstrings of everything in Python, the Makefile and `.ci/run`. A command is a
line of a fenced block (output is fenced as ```text, Python as ```python), an indented line of a module's docstring, or
a quoted span that begins with one of `PROGRAMS`; a span may leave out flags that its sentence does not need.
"""

import ast
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
MARKDOWN = sorted([*ROOT.glob("*.md"), *(ROOT / "benchmarks").glob("*.md"), *(ROOT / "docs").glob("*.md")])
FOLDERS = ("benchmarks", "configs", "launch", "t5like", "tests")
PYTHON = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PROGRAMS = ("t5like", "python", "make", "pip", "git", "cd")
NOT_COMMANDS = ("text", "python")  # languages of fenced blocks
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)(`{1,2})(?!`)([^`]+)\1(?!`)")


class Mention(NamedTuple):
    """A quoted piece of a document."""

    where: str  # README.md:23
    text: str
    whole: bool  # a complete command line; else it may leave out flags


@functools.cache
def mentions(word: str = "") -> list[Mention]:
    """Everything that any document with this word in it quotes."""
    kinds = [*dict.fromkeys(MARKDOWN, of_markdown).items(), *dict.fromkeys(PYTHON, of_python).items()]
    kinds += [(ROOT / "Makefile", of_makefile), (ROOT / ".ci/run", of_makefile)]
    texts = [(path, text, quoted) for path, quoted in kinds if word in (text := path.read_text("utf-8"))]
    return [each for path, text, quoted in texts for each in quoted(name_of(path), text)]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def of_markdown(name: str, text: str) -> Iterator[Mention]:
    """The lines of fenced blocks, and quoted spans."""
    for block in FENCED.finditer(text):
        if block[1] not in NOT_COMMANDS:
            yield from _lines(name, _line_number(text, block.start()) + 1, block[2])
    yield from _spans(name, 1, FENCED.sub(lambda block: "\n" * block[0].count("\n"), text))


def of_python(name: str, source: str) -> Iterator[Mention]:
    """Commands and quoted spans in docstrings; of a module's docstring also indented blocks."""
    tree = ast.parse(source)
    for node in (tree, *_statements(tree)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            first = node.body[0].lineno
            yield from _spans(name, first, text)
            if isinstance(node, ast.Module):
                yield from _block(name, first, text)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """The statements below a node, without the expressions, which are most of a tree."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield child
            yield from _statements(child)


def _block(name: str, first: int, text: str) -> Iterator[Mention]:
    """Commands among the lines of a docstring. Lines that begin with flags belong to the command above them. After
    a blank line they repeat that command with other flags."""
    command, number, complete = "", 0, ""
    for count, line in enumerate([*text.splitlines(), ""]):
        line = re.split(r"(?<=\S) {3,}", line.strip())[0]  # text after a gap describes the command
        program = line.partition(" ")[0]
        if program in PROGRAMS and (text.splitlines()[count].startswith("    ") or " --" in line):
            if command:
                yield Mention(f"{name}:{number}", command, True)
            command, number, complete = line, first + count, line
        elif line.startswith(("--", "[--")) and complete:
            command, number = (f"{command} {line}", number) if command else (f"{complete} {line}", first + count)
        elif command:
            yield Mention(f"{name}:{number}", command, True)
            command = ""


def of_makefile(name: str, text: str) -> Iterator[Mention]:
    """Recipes that run commands of this repository, and calls of make in comments."""
    text, target = text.replace("\\\n", "  "), ""
    for number, line in enumerate(text.splitlines(), start=1):
        line = re.sub(r"\$\(BIN\)/", "", line.strip().removeprefix("@")).removeprefix("exec ")
        if line.startswith("#"):
            target = found[1] if (found := re.match(r"# (make \w+)", line)) else target
            for arguments in re.findall(r'ARGS=(?:"[^"]*"|[^\s:;]+)', line) + [""] * bool(found):
                yield Mention(f"{name}:{number}", f"{target} {arguments}", True)
        elif re.match(r"(\w+=\S+ )*(python -m (t5like|pytest)|python \S+\.py|ruff|make) ", line):
            line = re.sub(r"\$\(ARGS\)|</dev/null|--no-print-directory", "", line).replace("$(CURDIR)/$(LIBTPU)", "DIR")
            yield Mention(f"{name}:{number}", line, True)


def _lines(name: str, first: int, block: str) -> Iterator[Mention]:
    """The commands of a shell's lines; a backslash joins two lines."""
    command, number = "", first
    for count, line in enumerate(block.splitlines()):
        number = number if command else first + count
        command += line.removesuffix("\\")
        if not line.endswith("\\"):
            if command.strip():
                yield Mention(f"{name}:{number}", command.strip(), True)
            command = ""


def _spans(name: str, first: int, text: str) -> Iterator[Mention]:
    for span in SPAN.finditer(text):
        yield Mention(f"{name}:{first + _line_number(text, span.start()) - 1}", " ".join(span[2].split()), False)


def _line_number(text: str, offset: int) -> int:
    return text.count("\n", 0, offset) + 1


def commands(mention: Mention) -> list[list[str]]:
    """The command lines of a mention, as words from the program's name on; none if it is not a command.

    JAX_X=1 .venv/bin/python -m t5like plan [--quick] ...  # text gives t5like, plan, --quick.
    """
    text = re.sub(r"(?<!\S)\[|\](?!\S)", "", mention.text)  # around optional words
    try:
        words = shlex.split(text, comments=mention.whole)
    except ValueError:  # an unbalanced quotation mark: a sentence, or code
        return []
    lines, line = [], []
    for word in [*words, "&&"]:
        if word != "&&":
            line.append(word)
        elif line := plain(line):
            lines.append(line)
            line = []
    programs = (*PROGRAMS, "pytest")
    known = [line for line in lines if mention.whole or line[0] in programs or re.fullmatch(r"[\w/]+\.py", line[0])]
    return [line for line in known if mention.whole or len(line) > 1]


def plain(words: list[str]) -> list[str]:
    """Without variables before the program, its folder, the interpreter, and "..."."""
    words = [word for word in words if word != "..."]
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words and re.fullmatch(r"(\.venv/bin/)?(python3?|t5like|pip)", words[0]):
        words = [words[0].rpartition("/")[2].removesuffix("3"), *words[1:]]
    if words[:2] == ["python", "-m"]:
        words = words[2:]
    elif words[:1] == ["python"] and len(words) > 1:
        words = words[1:]
    return words
