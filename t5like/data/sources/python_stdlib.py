"""The offline default corpus: the running Python's own standard library, as a TFDS builder that writes ArrayRecord.

There are three types of documents: topics of the language reference (`pydoc_data.topics`), docstrings, and source files
without those docstrings, so that a held-out docstring is not in a training source file, or the reverse. Modules are
parsed, never imported, so nothing runs. Only `source` imports this module, because TFDS takes long to load.
"""

import ast
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import tensorflow_datasets as tfds

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "pydoc_data"}
SHORTEST_DOCSTRING = 40  # characters; shorter ones carry little information
LONGEST_SOURCE = 200_000  # characters; longer files are generated tables


class PythonStdlib(tfds.core.GeneratorBasedBuilder):
    """Topics, docstrings and source files of one version of Python; its documents have a `text` and a `kind`."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=platform.python_version())]

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "kind": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, description=self.__doc__, features=features)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, str]]]:
        for key, kind, text in documents():
            yield key, {"text": text, "kind": kind}


def documents() -> Iterator[tuple[str, str, str]]:
    """(unique key, type, text) of every document, always the same and in the same order."""
    for name in sorted(topics):
        yield f"topic/{name}", "topic", topics[name]
    docstrings = set()
    for name, source, tree in modules():
        nodes = list(_docstring_nodes(tree))
        lines: list[str | None] = source.split("\n")  # not splitlines, which also splits at form feeds
        for number, (text, first, last) in enumerate(nodes):
            lines[first:last] = [None] * (last - first)
            if text not in docstrings:
                docstrings.add(text)
                yield f"docstring/{name}/{number}", "docstring", text
        code = "\n".join(line for line in lines if line is not None)
        if 0 < len(code) <= LONGEST_SOURCE:
            yield f"source/{name}", "source", code


def modules() -> Iterator[tuple[str, str, ast.Module]]:
    """(name relative to the library, source, syntax tree) of its files, in the order of the names' parts."""
    root, files = Path(sysconfig.get_path("stdlib")), []
    for directory, inner, names in os.walk(root):
        inner[:] = set(inner) - LEFT_OUT  # not visited: site-packages may be large
        files += (Path(directory, name) for name in names if name.endswith(".py"))
    for path in sorted(files):
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, ValueError, OSError):  # templates, files in other encodings
            continue
        yield path.relative_to(root).as_posix(), source, tree


def _docstring_nodes(parent: ast.AST) -> Iterator[tuple[str, int, int]]:
    """(text, first line from 0, line after the last) of the docstrings in a module, class or function and inside it."""
    text = ast.get_docstring(parent)
    first = parent.body[0].lineno - 1 if parent.body else 0
    if text and len(text) >= SHORTEST_DOCSTRING and first >= getattr(parent, "lineno", 0):  # not on the line of the def
        yield text, first, parent.body[0].end_lineno
    for child in parent.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstring_nodes(child)
