"""The structure of the package: import order, circles, sizes, the path of a batch, names of files, dependencies."""

import ast
import functools
import re
from pathlib import Path

import pytest
from documents import ROOT

# In import order: a folder or file imports only from itself and from those above it.
ORDER = (
    "errors",
    "types",
    "tree",
    "io",
    "config",
    "distributed",
    "sharding",
    "metrics",
    "data.sources",
    "data.tokenizers",
    "data.store",
    "data.randomness",
    "data.row_schedule",
    "data.objectives",
    "metrics.flops",
    "data.supervised",
    "data.pipeline",
    "model.masks",
    "model.kernels",
    "model",
    "optim",
    "checkpoint",
    "inference",
    "evaluation",
    "interop",
    "plan",
    "train",
    "rl",
    "inspect",
    "run",
    "cli.prompts",
    "cli.encoder_files",
    "cli.parser",
    "cli.inspection_flags",
    "cli.flags",
    "cli.commands",
    "cli.inspections",
    "launch",
    "cli",
)
LONGEST_FILE = 400  # lines
LONGEST_FUNCTION = 60  # lines
LOOPS = {"train/loop.py:train"}  # read from top to bottom, with banners

# From `train` to the update: what a reader opens to follow a batch of span corruption through the smallest T5.
PATH_OF_A_BATCH = (
    "train/loop",
    "train/pretraining",
    "data/pipeline",
    "data/randomness",
    "data/store/token_store",
    "data/objectives/windows",
    "data/objectives/denoisers",
    "data/objectives/denoising",
    "types",
    "sharding/logical_axes",
    "sharding/placement",
    "sharding/xla_options",
    "optim/step",
    "model/transformer",
    "model/stack",
    "model/block",
    "model/attention_plan",
    "model/masks",
    "model/attention",
    "model/positions",
    "model/layers",
    "model/mlp",
    "model/heads",
    "model/kernels/cpu",
    "optim/losses",
    "optim/optimizers",
    "optim/schedules",
    "tree",
)
MOST_FILES, MOST_LINES = 28, 4330

# Needed by others when they run, never imported here: package -> by what.
INDIRECT = {
    "array_record": "tensorflow_datasets writes and reads its files with it",
    "etils": "tensorflow_datasets and orbax need these of its extras",
    "flatbuffers": "jax.export writes artifacts with it",
    "importlib_resources": "tensorflow_datasets imports it",
}
IMPORTED_AS = {
    "orbax-checkpoint": "orbax",
    "tensorflow-datasets": "tensorflow_datasets",
    "tensorboardX": "tensorboardX",
    "ml_collections": "ml_collections",
    "PyYAML": "yaml",
}


@functools.cache
def modules() -> dict[str, ast.Module]:
    """The modules of the packages by dotted name, without `t5like.`; ``__init__`` and ``__main__`` have none."""
    found = {}
    for package, base in (("t5like", ROOT / "t5like"), ("launch", ROOT)):
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name not in ("__init__.py", "__main__.py"):
                found[".".join(path.relative_to(base).with_suffix("").parts)] = ast.parse(path.read_text("utf-8"))
    return found


def imported_by(tree: ast.Module, known: frozenset[str]) -> set[str]:
    """The modules of the packages that a module imports, also inside functions."""
    names = set()
    packages = ("t5like", "launch")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"relative import in line {node.lineno}")
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in packages:
            base = node.module.removeprefix("t5like").lstrip(".")
            for alias in node.names:
                full = f"{base}.{alias.name}".lstrip(".")
                names.add(full if full in known else base)
        elif isinstance(node, ast.Import):
            own = [alias.name for alias in node.names if alias.name.partition(".")[0] in packages]
            names |= {name.removeprefix("t5like.") for name in own}
    return {name for name in names if name in known}


@functools.cache
def imports() -> dict[str, set[str]]:
    known = frozenset(modules())
    return {name: imported_by(tree, known) for name, tree in modules().items()}


def rank(module: str) -> int:
    """The place of a module in `ORDER`: that of the longest entry that it is, or lies in."""
    matching = [entry for entry in ORDER if module == entry or module.startswith(f"{entry}.")]
    assert matching, f"{module} lies in no folder of ORDER"
    return ORDER.index(max(matching, key=len))


def circles(graph: dict[str, set[str]]) -> list[str]:
    """The modules that import each other in a circle: what is left when modules without imports are removed."""
    graph = {name: set(edges) for name, edges in graph.items()}
    while leaves := {name for name, edges in graph.items() if not edges & set(graph)}:
        for name in leaves:
            del graph[name]
    return sorted(graph)


def test_folders_import_only_from_those_above_them():
    upward = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if rank(other) > rank(module)
    ]
    assert upward == []


def test_no_modules_import_each_other_in_a_circle():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
    assert circles(imports()) == []


def functions(tree: ast.AST, prefix: str = "") -> list[tuple[str, int]]:
    """The functions of a module by qualified name, with their lines."""
    found = []
    for node in ast.iter_child_nodes(tree):
        name = f"{prefix}{getattr(node, 'name', '')}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.append((name, node.end_lineno - node.lineno + 1))
        found += functions(node, f"{name}." if hasattr(node, "name") else prefix)
    return found


@pytest.mark.parametrize("folder", ["t5like", "launch", "configs", "benchmarks", "tests"])
def test_files_and_functions_stay_short(folder):
    too_long = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        name, text = path.relative_to(ROOT / folder).as_posix(), path.read_text("utf-8")
        if (lines := text.count("\n")) > LONGEST_FILE:
            too_long.append(f"{name}: {lines} lines")
        for function, lines in functions(ast.parse(text)):
            if lines > LONGEST_FUNCTION and f"{name}:{function}" not in LOOPS:
                too_long.append(f"{name}:{function}: {lines} lines")
    assert too_long == []


def test_the_path_of_a_batch_stays_short():
    lines = [(ROOT / "t5like" / f"{name}.py").read_text("utf-8").count("\n") for name in PATH_OF_A_BATCH]
    assert (len(lines), sum(lines)) <= (MOST_FILES, MOST_LINES) and sum(lines) <= MOST_LINES


def test_no_file_is_a_drawer():
    drawers = {"utils", "util", "common", "helpers", "helper", "misc", "tools"}
    assert [path for path in ROOT.rglob("t5like/**/*") if path.stem in drawers] == []


def test_tests_mirror_the_folders_of_the_package():
    others = {"benchmarks", "browser", "golden", "gpu", "live", "tpu", "cluster", "container", "reliability"}
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    missing = [str(path) for path in folders if path.parts and path.parts[0] not in others]
    assert [path for path in missing if not ((ROOT / "t5like" / path).is_dir() or (ROOT / path).is_dir())] == []


def requirements() -> list[str]:
    """The packages that setup.py asks for, extras apart."""
    [call] = [
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text("utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    ]
    [value] = [keyword.value for keyword in call.keywords if keyword.arg == "install_requires"]
    return [re.match(r"[\w.-]+", requirement)[0] for requirement in ast.literal_eval(value)]


def test_every_dependency_is_imported_somewhere():
    texts = [Path(path).read_text("utf-8") for path in (ROOT / "t5like").rglob("*.py")]
    texts += [Path(path).read_text("utf-8") for path in (ROOT / "configs").rglob("*.py")]
    texts += [Path(path).read_text("utf-8") for path in (ROOT / "launch").rglob("*.py")]
    unused = []
    for package in requirements():
        module = IMPORTED_AS.get(package, package.replace("-", "_"))
        imported = re.compile(rf"^\s*(?:import|from) {module}\b", re.MULTILINE)
        if package not in INDIRECT and not any(imported.search(text) for text in texts):
            unused.append(package)
    assert unused == []
