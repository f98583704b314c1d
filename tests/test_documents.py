"""Every command, flag, field and file that a document names exists."""

import ast
import functools
import importlib
import importlib.util
import itertools
import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import documents
import pytest
from _pytest.mark.expression import Expression
from documents import MARKDOWN, ROOT, Mention, commands, mentions

from launch import options, record
from t5like import errors
from t5like.cli.flags import build_parser, parse
from t5like.config import loader
from t5like.config.schema import Config, default

# Flags that a sentence may leave out of a command.
SAMPLES = {"config": "configs/tiny.py", "workdir": "RUN", "topology": "v5e:2x4", "input": "DIR", "output": "DIR"}
SAMPLES |= {"format": "hf", "prompt": "TEXT", "step": "1"}
NOT_FIELDS = ("py", "model", "json", "jsonl", "txt")  # of files that have the name of a section: tokenizer.json
NOT_FLAGS = ("--xla",)  # flags of XLA


# ---- Command lines parse ----


def check_t5like(words: list[str], whole: bool) -> None:
    """The parser of t5like accepts the words, and the loader accepts the config with its overrides."""
    if words == ["COMMAND"]:
        return
    if words[0] == "launch":
        check_launch(words[1:], whole)
        return
    words = [word for word in words if word != "--config.SECTION.FIELD=VALUE"]
    if not whole:
        words = with_required(build_parser(), words)
    parsed, overrides = parse(words)
    check_config(getattr(parsed, "config", None), overrides)


def with_required(parser, words: list[str]) -> list[str]:
    """A sentence's command with the flags that it leaves out; without a subject, with the first one."""
    given = {word.partition("=")[0] for word in words}
    for action in parser._actions:
        if not action.required or given & {*action.option_strings}:
            continue
        if action.option_strings:
            words = [*words, f"{action.option_strings[0]}={SAMPLES[action.dest]}"]
        elif not action.choices:  # values without a flag
            words = [*words, *([action.metavar] * all(word.startswith("-") for word in words))]
        else:  # a command, or the subject of one
            name, *rest = words or [next(iter(action.choices))]
            parsers = action.choices if isinstance(action.choices, dict) else {}  # else it is a value
            words = [name, *(with_required(parsers[name], rest) if name in parsers else rest)]
    return words


def check_launch(words: list[str], whole: bool) -> None:
    """The parser of t5like launch accepts the words, and that of t5like the command of the job."""
    if whole or len(words) > 1:
        if not whole and words[0] in record.BACKENDS and "--" not in words:
            words = [*words, "--", "train", "--config=tiny", "--workdir=RUN"]
        request = options.parse_arguments(words)
        if request.job is not None:
            check_t5like([word for word in request.job.command if "/NAME" not in word], True)
    else:
        assert not words or words[0] in ("BACKEND", *record.BACKENDS, "status", "logs", "cancel"), words


def check_config(name: str | None, overrides: list[tuple[str, str]]) -> None:
    """A preset, or every preset that matches NAME, accepts these fields."""
    if name is None:
        return
    if "NAME" in name:
        paths = sorted(ROOT.glob(name.replace("NAME", "*")))
    elif re.fullmatch(r"(RUN|runs/\w+)/config\.json", name):  # of a run that the reader has
        paths = ["tiny"]
    else:
        paths = [name if name in loader.presets() else ROOT / name]
    assert paths, f"{name} is no file"
    for path in paths:
        loader.load(path, overrides)


@functools.cache
def script(path: str):
    """The module of a script, imported as if it ran."""
    before = dict(os.environ)  # a script may set what JAX reads when it starts
    try:
        spec = importlib.util.spec_from_file_location(f"script_{Path(path).stem}", ROOT / path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        os.environ.clear()
        os.environ.update(before)


def check_script(path: str, arguments: list[str]) -> None:
    """The parser of the script accepts the arguments; without a parser, it accepts what its docstring shows."""
    path = path.removeprefix("/path/to/").removeprefix("REPOSITORY/")
    if path == "run.py":  # of an exported directory
        path = "t5like/interop/stablehlo_run.py"
    if "/" not in path:
        path = f"benchmarks/{path}"
    assert (ROOT / path).is_file(), f"{path} is no file"
    source = (ROOT / path).read_text("utf-8")
    if path.startswith("benchmarks/") or path == "tests/golden/make_plans.py":
        script(path).parse([word for word in arguments if word != "--config.SECTION.FIELD=VALUE"])
        return
    for word in itertools.takewhile(lambda word: word != "--", arguments):
        if word.startswith("--"):
            assert f'"{word.partition("=")[0]}"' in source, f"{path} has no flag {word}"
    flags = re.findall(r"add_argument\((.*)\)", source)
    optional = bool(flags) and all("default=" in flag for flag in flags)
    assert optional or bool(arguments) == ("argv" in source or "add_argument" in source), f"{path}: {arguments}"


def check_make(words: list[str], whole: bool) -> None:
    """The targets exist, and ARGS is what the program of the target accepts."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = [word for word in words if "=" not in word]
    variables = dict(word.split("=", 1) for word in words if "=" in word)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}: the target does not exist"
    for name in variables:
        assert f"$({name})" in makefile or f"$(or $({name})," in makefile, f"the Makefile has no {name}"
    arguments = shlex.split(variables.get("ARGS", ""))
    if "train" in targets:
        check_t5like(["train", "--config=configs/tiny.py", "--workdir=RUN", *arguments], True)
    elif "golden" in targets:
        names = [word for word in arguments if word != "NAME"]
        check_script("tests/golden/make_plans.py", names)
    elif "soak" in targets:
        check_script("tests/reliability/soak.py", arguments)
    elif {"test", "reliability", "parity"} & {*targets}:
        check_pytest(arguments)
    elif arguments:
        raise AssertionError(f"make {targets}: no rule for its arguments {arguments}")


def check_pytest(words: list[str]) -> None:
    """Files exist, -k selects a test, and -m names registered markers."""
    expression = ""
    paths = [word for word in words if not word.startswith("-")]
    if "-k" in words:
        expression = words[words.index("-k") + 1]
        paths.remove(expression)
    if "-m" in words:
        markers = words[words.index("-m") + 1]
        paths.remove(markers)
        registered = re.findall(r'"(\w+): ', (ROOT / "pyproject.toml").read_text("utf-8").partition("markers = ")[2])
        unknown = {*re.findall(r"\w+", markers)} - {"not", "and", "or", *registered}
        assert not unknown, f"pytest {words}: no marker {unknown}"
    for path in paths:
        assert (ROOT / path).exists(), f"{path} is no file"
    roots = [ROOT / path for path in paths] or [ROOT / "tests"]
    files = [file for root in roots for file in ([root] if root.is_file() else root.rglob("test_*.py"))]
    names = [
        [file.name, name] for file in files for name in re.findall(r"^def (test_\w+)", file.read_text("utf-8"), re.M)
    ]
    selects = Expression.compile(expression).evaluate if expression else (lambda matches: True)
    matches = lambda test: lambda text, **_: any(text.lower() in name.lower() for name in test)
    assert any(selects(matches(test)) for test in names), f"pytest {words} selects no test"


def check_pip(words: list[str], whole: bool) -> None:
    """It installs something, and extras of t5like are those of setup.py."""
    assert words[0] in ("install", "wheel") and len(words) > 1, words
    for extra in re.findall(r"(?:t5like|\.)\[(\w+)\]", " ".join(words)):
        assert extra in extras(), f"setup.py has no extra {extra}"


def extras() -> set[str]:
    [call] = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text("utf-8")))
              if isinstance(node, ast.keyword) and node.arg == "extras_require"]  # fmt: skip
    return {key.value for key in call.value.keys}


CHECKS: dict[str, Callable[[list[str], bool], None]] = {
    "t5like": check_t5like,
    "launch": check_launch,
    "make": check_make,
    "pip": check_pip,
    "pytest": lambda words, whole: check_pytest([word for word in words if not word.startswith("--")]),
    "git": lambda words, whole: None,
    "cd": lambda words, whole: None,
    "ruff": lambda words, whole: None,
}


def problem(words: list[str], whole: bool) -> str:
    """Why a command can't be correct; empty if it is."""
    program, *rest = words
    try:
        if program.endswith(".py"):
            check_script(program, rest)
        elif program.startswith("t5like."):
            assert importlib.util.find_spec(program), f"there is no module {program}"
        elif program in CHECKS:
            CHECKS[program](rest, whole)
        else:
            return f"no check for {program!r}; fence output as ```text, or add the program to CHECKS"
    except (AssertionError, errors.UserError) as error:
        return str(error)
    except SystemExit as stop:  # --help, --version, and the refusals of argparse
        return f"exit code {stop.code}" if stop.code else ""
    return ""


@pytest.fixture(autouse=True)
def benchmarks_path(monkeypatch):
    """Benchmarks import each other as scripts do; paths of presets in documents start in the clone."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_every_command_in_a_document_exists():
    named = [(mention, words) for mention in mentions() for words in commands(mention)]
    assert len({words[0] for _, words in named}) >= 8 and len(named) > 100
    wrong, check = {}, functools.cache(lambda words, whole: problem([*words], whole))  # half of them are repeated
    for mention, words in named:
        if reason := check(tuple(words), mention.whole):
            wrong[f"{mention.where}: {' '.join(words)}"] = reason
    assert not wrong, json.dumps(wrong, indent=1)


BAD = [
    ("t5like trian --config=configs/tiny.py --workdir=RUN", "invalid choice: 'trian'"),
    ("t5like train --config=configs/tiny.py --workdir=RUN --steps=3", "unrecognized arguments: --steps=3"),
    ("t5like train --config=configs/tini.py --workdir=RUN", "no such file"),
    ("t5like train --config=configs/tiny.py --workdir=RUN --config.train.steps=3", "there is no field 'steps'"),
    (
        "t5like train --config=configs/tiny.py --workdir=RUN --config.data.objective=gap",
        "data.objective='gap' must be one of",
    ),
    ("t5like export --format=onnx --workdir=RUN --output=DIR", "invalid choice: 'onnx'"),
    (".venv/bin/python benchmarks/train_step.py", "one of the arguments --config --shape is required"),
    ("python benchmarks/input_pipeline.py --config.data.batch=3", "there is no field 'batch'"),
    ("python benchmarks/peers.py --shapes=huge", "exit code 2"),
    ("python benchmarks/speed.py", "benchmarks/speed.py is no file"),
    ("make trian", "the target does not exist"),
    ("make train ARGS=--config.train.steps=3", "there is no field 'steps'"),
    ("make golden ARGS=--prove", "exit code 2"),
    ("make test ARGS='-k nothing_is_called_so'", "selects no test"),
    ("""make reliability ARGS="-m 'not quick'" """.strip(), "no marker {'quick'}"),
    ("python -m pytest tests/live/test_gone.py", "is no file"),
    ("pip install 't5like[everything]'", "no extra everything"),
    ("step 900: held-out loss 3.671", "no check for 'step'"),
    ("JAX_X=1 .venv/bin/python -m t5like plan --config=configs/tiny.py", "required: --topology"),
]


@pytest.mark.parametrize("line, reason", BAD, ids=[line for line, _ in BAD])
def test_a_wrong_command_is_reported(line, reason):
    [words] = commands(Mention("a document", line, True))
    assert reason in problem(words, True)


def test_commands_are_found_in_every_type_of_document():
    text = (
        "# Title\nSay `t5like plan\n--quick`:\n```\n.venv/bin/t5like train \\\n  --x=1  # why\n```\n```text\nno\n```\n"
    )
    assert list(documents.of_markdown("F", text)) == [
        Mention("F:5", ".venv/bin/t5like train   --x=1  # why", True),
        Mention("F:2", "t5like plan --quick", False),
    ]
    source = '"""What it is.\n\n    python a.py --b [--c]\n        [--d]\n\nOr:\n\n    --e=2\n    --f\n"""\n'
    assert [commands(mention) for mention in documents.of_python("F", source)] == [
        [["a.py", "--b", "--c", "--d"]],
        [["a.py", "--b", "--c", "--e=2", "--f"]],
    ]
    makefile = '# make train  does; ARGS="--a=1" more\n#   ARGS=--b: less\nx:\n\t@$(BIN)/python -m t5like train\n'
    assert [commands(mention)[0] for mention in documents.of_makefile("F", makefile)] == [
        ["make", "train", "ARGS=--a=1"],
        ["make", "train"],
        ["make", "train", "ARGS=--b"],
        ["t5like", "train"],
    ]


# ---- Flags, fields, files ----


def test_every_flag_and_field_in_a_document_exists():
    [subparsers] = build_parser()._subparsers._group_actions
    [backends] = options.build_parser()._subparsers._group_actions
    parsers = [*subparsers.choices.values(), *backends.choices.values()]
    parsers += [
        sub for group in subparsers.choices["inspect"]._subparsers._group_actions for sub in group.choices.values()
    ]
    flags = {flag for sub in parsers for action in sub._actions for flag in action.option_strings}
    folders = (ROOT / "benchmarks", ROOT / "tests/golden")
    scripts = "".join(path.read_text("utf-8") for folder in folders for path in folder.glob("*.py"))
    fields, wrong = loader._types(Config), []
    for mention in mentions():
        if mention.where.startswith("CHANGELOG"):  # it may name what was removed
            continue
        for word in mention.text.split() if mention.text.startswith("--") and not mention.whole else []:
            name, _, value = word.partition("=")
            if name.startswith("--config."):
                if value and "section.field" not in name.lower():
                    loader.override(default().to_dict(), name.removeprefix("--config."), value)
            elif name.startswith("--") and name != "--" and name not in flags and f'"{name}"' not in scripts:
                wrong += [f"{mention.where}: {word}"] * (not name.startswith(NOT_FLAGS))
        for name in re.split(r"=\S*\s?", mention.text) if ".md:" in mention.where else ():
            section, *names = name.split(".")
            if section in fields and names and names[-1] not in NOT_FIELDS and not is_field(fields[section], names):
                wrong.append(f"{mention.where}: {mention.text}")
    assert not wrong, wrong


def is_field(section: type, names: list[str]) -> bool:
    """Whether a dotted name leads to a field; NAME.* is all of them, NAME.FIELD any."""
    known = loader._types(section)
    if names[0] in ("*", "FIELD", "AXIS"):
        return True
    return names[0] in known and (not names[1:] or is_field(known[names[0]], names[1:]))


def test_every_extra_that_a_message_names_exists():
    named = {extra for path in documents.PYTHON if documents.name_of(path).startswith(("t5like/", "launch/"))
             for extra in re.findall(r"t5like\[(\w+)\]", path.read_text("utf-8"))}  # fmt: skip
    assert named and named <= extras()


def test_every_file_that_a_document_names_exists(trained):
    made = {path.name for path in trained.iterdir()} | {
        "predictions",
        "evaluations",
        "init_from.txt",
        "profile",
        "samples",
    }
    made |= {"bad_steps", "step.json", "text.jsonl", "rows.npz"}
    theirs = {"my_texts", "exported", "RUN", "DIR", "runs", "spiece.model", "my.jsonl", "tokenizer.json", "run.py"}
    theirs |= {"WORKDIR", "launch.toml", "launch.json", "logs", ".venv"}
    no_files = {"train", "eval", "baseline", "stats", "encoder", "time"}  # names of metrics and parameters begin so
    wrong = []
    for path in MARKDOWN:
        text, name = path.read_text("utf-8"), documents.name_of(path)
        quoted = [(mention.where, mention.text) for mention in documents.of_markdown(name, text) if not mention.whole]
        quoted += [(name, link) for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
        for where, word in quoted:
            is_path = re.fullmatch(r"[\w.*-]+(/[\w.*-]*)*", word) and re.search(r"/|\.(py|md|txt|jsonl?|toml)$", word)
            if not is_path or word.split("/")[0] in made | theirs | no_files:
                continue
            candidate = word.replace("NAME", "*").rstrip("/")
            folders = ("t5like", "t5like/data", "configs", "benchmarks")
            places = (ROOT, path.parent, *(ROOT / folder for folder in folders))
            if not any(any(place.glob(candidate)) or any(place.glob(f"{candidate}.py")) for place in places):
                wrong.append(f"{where}: {word}")
    assert not wrong, wrong


def test_every_name_of_t5like_that_a_script_uses_exists():
    """Also of scripts that need PyTorch or libtpu, which this suite can't run."""
    wrong, of_older_code = [], ("make_format_1.py", "make_formats.py")
    need_extras = ("t5like.evaluation.lm_eval", "t5like.interop.huggingface.reference_logits")  # lm_eval, PyTorch
    for path in documents.PYTHON:
        if path.is_relative_to(ROOT / "t5like") or path.name in of_older_code:
            continue
        tree, modules = ast.parse(path.read_text("utf-8")), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "t5like":
                for alias in node.names:
                    if not has(node.module, alias.name):
                        wrong.append(f"{documents.name_of(path)}:{node.lineno}: {node.module}.{alias.name}")
                    elif importlib.util.find_spec(f"{node.module}.{alias.name}") if is_package(node.module) else None:
                        modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                module = modules[node.value.id]
                if module not in need_extras and not hasattr(importlib.import_module(module), node.attr):
                    wrong.append(f"{documents.name_of(path)}:{node.lineno}: {module}.{node.attr}")
    assert not wrong, wrong


def is_package(module: str) -> bool:
    return importlib.util.find_spec(module).submodule_search_locations is not None


def has(module: str, name: str) -> bool:
    """Whether a module defines a name, or is a package with such a module. lm-eval need not be installed."""
    if is_package(module) and importlib.util.find_spec(f"{module}.{name}"):
        return True
    if module == "t5like.evaluation.lm_eval":
        text = (ROOT / "t5like/evaluation/lm_eval.py").read_text()
        return bool(re.search(rf"^(?:def|class) {name}\b", text, re.MULTILINE))
    return hasattr(importlib.import_module(module), name)
