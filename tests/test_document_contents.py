"""What documents promise: links, modules and messages that exist, and a complete translation."""

import ast
import functools
import re

import pytest
from documents import FENCED, MARKDOWN, ROOT, name_of

LINK = re.compile(r"\]\(([^)\s]+)\)")
README, TRANSLATION = ROOT / "README.md", ROOT / "README.zh.md"


def outside_fences(text: str) -> str:
    return FENCED.sub("", text)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of headings: lower case, without punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", outside_fences(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", MARKDOWN, ids=name_of)
def test_every_relative_link_resolves(path):
    wrong = []
    for link in LINK.findall(outside_fences(path.read_text("utf-8"))):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.is_file() or (anchor and anchor not in anchors(target.read_text("utf-8"))):
            wrong.append(link)
    assert not wrong, wrong


@pytest.mark.parametrize("path", MARKDOWN, ids=name_of)
def test_python_in_a_document_compiles(path):
    for block in FENCED.finditer(path.read_text("utf-8")):
        if block[1] == "python":
            ast.parse(block[2])


def test_readme_is_short_and_names_every_document():
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= 150
    linked = {link.partition("#")[0] for link in LINK.findall(text)}
    assert {name_of(path) for path in (ROOT / "docs").iterdir()} <= linked


def test_the_translation_has_the_commands_outputs_and_links_of_the_original():
    def parts(path):
        text = path.read_text("utf-8")
        blocks = [[re.split(r"\s+# ", line)[0] for line in block[2].splitlines()] for block in FENCED.finditer(text)]
        links = [link for link in LINK.findall(outside_fences(text)) if not link.startswith("README")]
        return blocks, links, [len(line) - len(line.lstrip("#")) for line in text.splitlines() if line.startswith("#")]

    assert parts(README) == parts(TRANSLATION)


def test_internals_describe_every_module():
    text = (ROOT / "docs/internals.md").read_text("utf-8")
    modules = {
        path.relative_to(base).as_posix()
        for base, package in ((ROOT / "t5like", ROOT / "t5like"), (ROOT, ROOT / "launch"))
        for path in package.rglob("*.py")
        if not path.name.startswith("__")
    }
    assert modules - set(re.findall(r"`([\w/]+\.py)`", text)) == set()


@functools.cache
def templates() -> list[list[str]]:
    """The constant parts of every f-string and of every text of the package, longest first."""
    found = []
    for path in [*(ROOT / "t5like").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append([part.value for part in node.values if isinstance(part, ast.Constant)])
    return sorted(found, key=lambda parts: -sum(map(len, parts)))


def test_messages_in_troubleshooting_are_those_of_the_code():
    text = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
    messages = [block[2].strip() for block in FENCED.finditer(text) if block[2].startswith("t5like: ")]
    assert len(messages) == 10
    for message in messages:
        parts = next((parts for parts in templates() if is_in_order(parts, message)), [])
        assert sum(map(len, parts)) >= 15, f"no message of the code is like {message!r}"


def is_in_order(parts: list[str], message: str) -> bool:
    position = 0
    for part in parts:
        position = message.find(part, position)
        if position < 0:
            return False
        position += len(part)
    return True
