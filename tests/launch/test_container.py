"""The container images: locked requirements, build context, user. `tests/container` installs one of them."""

import ast
import re
import subprocess

import pytest
from documents import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CONTAINER = ROOT / "launch" / "container"
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
TARGETS = ("cpu", "cuda", "tpu")


def locked(target: str) -> dict[str, str]:
    """The versions in a file of locked requirements."""
    lines = (CONTAINER / f"{target}.txt").read_text("utf-8").splitlines()
    pattern = r"([\w.-]+)==([\w.+!-]+) --hash=sha256:[0-9a-f]{64}"
    matches = [re.fullmatch(pattern, line) for line in lines if not line.startswith("#")]
    assert all(matches), f"{target}.txt has a line without version or hash"
    return {canonicalize_name(match[1]): match[2] for match in matches}


def required(target: str) -> list[Requirement]:
    """What setup.py asks for, with the extra of a target."""
    [call] = [
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text("utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    ]
    values = {word.arg: word.value for word in call.keywords}
    extras = ast.literal_eval(values["extras_require"])
    return [Requirement(text) for text in (*ast.literal_eval(values["install_requires"]), *extras.get(target, ()))]


@pytest.mark.parametrize("target", TARGETS)
def test_locked_versions_are_those_that_setup_and_constraints_allow(target):
    versions = locked(target)
    wrong = [str(each) for each in required(target) if versions[canonicalize_name(each.name)] not in each.specifier]
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if "==" in line]
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    wrong += [name for name, version in versions.items() if pinned.get(name, version) != version]
    assert wrong == [], "run make lock"


def test_each_image_has_the_plugin_of_its_devices():
    assert {"jax-cuda12-plugin", "nvidia-cudnn-cu12"} <= set(locked("cuda")) - set(locked("cpu"))
    assert "libtpu" in set(locked("tpu")) - set(locked("cpu"))


def test_no_file_of_the_images_names_a_host():
    files = [ROOT / "Dockerfile", *CONTAINER.iterdir()]
    assert [path.name for path in files if path.is_file() and "://" in path.read_text("utf-8")] == []


def test_every_image_ends_with_a_user_that_is_not_root_and_a_pinned_base():
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    assert [stage.split()[2] for stage in stages] == ["base", "cuda", "tpu", "cpu"]
    assert re.match(r"python:3\.11\.\d+-slim-\w+ ", stages[0])
    for stage in stages[1:]:
        instructions = [line for line in stage.splitlines()[1:] if line]
        assert [line for line in instructions if line.startswith("USER")] == ["USER 1000:1000"]
        assert instructions.index("USER 1000:1000") > max(
            index for index, line in enumerate(instructions) if line.startswith(("RUN", "COPY"))
        )


def test_the_build_context_has_nothing_but_sources():
    rules = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    rules = [rule for rule in rules if rule and not rule.startswith("#")]
    assert rules[0] == "*"
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    assert kept == {"setup.py", "README.md", "LICENSE", "launch", "configs", "t5like"}


@pytest.mark.parametrize("arguments", [(), ("requirements", "gpu", "x"), ("package",)])
def test_the_installation_refuses_other_arguments(tmp_path, arguments):
    arguments = [str(tmp_path / each) if each == "x" else each for each in arguments]
    done = subprocess.run(["bash", CONTAINER / "install.sh", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and (
        "install.sh requirements TARGET" in done.stderr or "gpu is no image" in done.stderr
    )
    assert not (tmp_path / "x").exists()
