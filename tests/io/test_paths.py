"""Paths with any characters: written and read, or refused in one printable line before anything is written."""

import contextlib
import os
import shutil
from pathlib import Path

import pytest
from conftest import contents
from small_states import REST, assert_bitwise, new_state, on_mesh, saved

from t5like.checkpoint import saving
from t5like.checkpoint.checkpoints import Checkpoints
from t5like.config import loader
from t5like.data.sources.files import matching_files
from t5like.errors import CheckpointError, ConfigError, DataError, printable
from t5like.io import paths

# Characters that a file name may contain and that some libraries interpret.
ANY = "-~a[b]c*d?e\\f 'g\" h%20#i$HOME,j:k\nl\tm\x1bé\U0001f600\u202e&;|<>!{x}=@3. "

UNFINISHED = "state.orbax-checkpoint-tmp"


def test_a_run_directory_of_any_name_is_written_and_read_back(command, decoder_flags, texts, trained_decoder, tmp_path):
    (tmp_path / ANY).mkdir()
    data = (tmp_path / ANY / "a.txt", tmp_path / ANY / "prepared")
    data[0].write_bytes((texts / "a.txt").read_bytes())
    run, exported, again = (tmp_path / name / ANY for name in ("run", "exported", "again"))
    shutil.copytree(trained_decoder, run)
    ask = ("--prompt=ba de", "--max_new_tokens=4")
    answers = []
    for arguments in (
        ("prepare", *decoder_flags, f"--config.data.source=text:{data[0]}", f"--config.data.cache_directory={data[1]}"),
        (
            "train",
            *decoder_flags,
            f"--workdir={run}",
            "--config.train.num_steps=3",
            f"--config.tokenizer.path={run}/tokenizer.model",
        ),
        ("evaluate", f"--workdir={run}"),
        ("generate", f"--workdir={run}", *ask),
        ("export", "--format=hf", f"--workdir={run}", f"--output={exported}"),
        ("import", "--format=hf", f"--input={exported}", f"--workdir={again}"),
        ("generate", f"--workdir={again}", *ask),
    ):
        code, out, err = command(*arguments)
        assert code == 0, err
        assert not {"\x1b", "\u202e", "\t"} & set(out + err), (arguments[0], out, err)
        answers += [out] if arguments[0] == "generate" else []
    assert answers[0] == answers[1] != ""
    assert Checkpoints(run / "checkpoints", keep=9).steps() == [1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([ANY, "run", "exported", "again"])


@pytest.mark.parametrize(
    "name", ["a[b]c", "a\\b", "gs:", "a\udcffb", "a\nb", "%5B#?", "n" * 255, "/".join(["d" * 200] * 9)]
)
def test_checkpoints_are_restored_from_directories_of_any_name(tmp_path, name):
    state = new_state(1)
    assert_bitwise(saved(tmp_path / name, 1).restore(on_mesh(state, data=1)), state)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["a*b", "a?b"])
def test_a_directory_named_like_a_pattern_does_not_read_matching_directories(tmp_path, name):
    for other in ("a1b", "a2b"):  # killed before their manifests were merged
        shutil.move(saved(tmp_path / other, 1, rows=32).directory / "1" / "state", tmp_path / other / "1" / UNFINISHED)
    assert_bitwise(saved(tmp_path / name, 1).restore(on_mesh(new_state(1), data=1)), new_state(1))


def test_a_save_without_arrays_is_no_checkpoint_and_deletes_none(tmp_path, monkeypatch):
    directory = tmp_path / "a[b]c"
    saved(directory, 1, keep=1)
    monkeypatch.setattr(saving, "literal_path", contextlib.nullcontext)  # Orbax then reads a pattern, writes none
    store = Checkpoints(directory, keep=1)
    store.save(new_state(2), **REST)
    with pytest.raises(CheckpointError, match="2 could not be written: its arrays are missing"):
        store.close()
    assert sorted(path.name for path in directory.iterdir()) == ["1", "run_id"] and store.steps() == [1]


def test_a_save_is_not_committed_before_its_metadata_were_read_back(tmp_path, monkeypatch):
    read = saving.ocp.PyTreeCheckpointHandler.metadata
    seen = []

    def without_a_leaf(self, directory):
        seen.append((Path(directory).parent / saving.COMMITTED).exists())
        metadata = read(self, directory)
        del metadata.tree["params"]["decoder"]
        return metadata

    monkeypatch.setattr(saving.ocp.PyTreeCheckpointHandler, "metadata", without_a_leaf)
    with pytest.raises(CheckpointError, match="1 could not be written: params/decoder/kernel can't be read back"):
        saved(tmp_path, 1)
    assert seen == [False, False] and [path.name for path in tmp_path.iterdir()] == ["run_id"]


def test_a_name_with_special_characters_is_reached_by_a_temporary_link(tmp_path):
    with paths.literal_path(tmp_path) as path:
        assert path == tmp_path
    (directory := tmp_path / "a[b]").mkdir()
    with paths.literal_path(directory) as path:
        assert path != directory and path.resolve() == directory
    assert not os.path.lexists(path.parent) and directory.is_dir()


LONG = "n" * 300
TEXT = "must be UTF-8 text without NUL characters"  # any text of a config
REFUSED = {
    "a long name": (LONG, "has a name of 300 bytes, and at most 255 are possible; use a shorter one"),
    "a long path": ("/".join(["d" * 200] * 22), "bytes, and at most 3840 are possible; use a shorter one"),
    "a bucket": ("gs://bucket/run", "must be a path, not a URL; mount that storage and use /mnt/NAME"),
    "no UTF-8": ("a\udcffb", "must be UTF-8, because it is written into UTF-8 files; rename it"),
    "nothing": ("", "must be a path, without NUL characters; use runs/mine"),
    "NUL": ("a\0b", "must be a path, without NUL characters; use runs/mine"),
    "no such user": (
        "~nobody7/run",
        "home directory that is not known; use an absolute path, or ./~nobody7/run",
    ),
}


@pytest.mark.parametrize("path, rule", REFUSED.values(), ids=REFUSED)
def test_an_impossible_path_is_refused_in_one_line(path, rule, command, flags, tmp_path, monkeypatch):
    project, prepared = Path.cwd(), next(flag for flag in flags if "data.cache_directory" in flag)
    monkeypatch.chdir(tmp_path)
    train = ["train", f"--config={project}/configs/tiny.py", *flags[1:]]
    cases = [
        [*train, f"--workdir={path}"],
        ["prepare", *train[1:], f"--workdir={path}"],
        ["evaluate", f"--workdir={path}"],
        ["evaluate", "--workdir=run", "--tasks=a", f"--tasks_dir={path}"],
        ["generate", f"--workdir={path}", "--prompt=a"],
        ["generate", "--workdir=run", f"--prompts_file={path}"],
        ["generate", "--workdir=run", "--prompts_file=run", f"--output={path}"],
        ["export", "--format=hf", f"--workdir={path}", "--output=out"],
        ["export", "--format=stablehlo", "--workdir=run", f"--output={path}"],
        ["import", "--format=hf", f"--input={path}", "--workdir=run"],
        ["import", "--format=hf", "--input=in", f"--workdir={path}"],
        ["plan", f"--config={path}", "--topology=cpu:1"],
        ["plan", *train[1:2], "--topology=cpu:1", f"--keep={path}"],
        [*train, "--workdir=run", f"--config.data.cache_directory={path}"],
    ]
    if path:  # else none is named
        cases += [[*train, "--workdir=run", f"--config.init_from.checkpoint={path}"]]
    if path and not path.startswith("~"):
        cases += [[*train, "--workdir=run", prepared, f"--config.tokenizer.path={path}"]]
    for arguments in cases:
        code, _, err = command(*arguments)
        wanted = TEXT if arguments[-1].startswith("--config.") and path in ("a\udcffb", "a\0b") else rule
        assert (code, err.count("\n")) == (2, 1) and wanted in err and err[:-1].isprintable(), err
    assert not contents(tmp_path)


def test_a_tilde_is_expanded_only_at_the_start(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    names = ("~/run", "./~run", "a~b", "/a/~/b", "$HOME/run")
    assert [str(paths.expand(name)) for name in names] == ["/home/me/run", "~run", "a~b", "/a/~/b", "$HOME/run"]


def test_a_temporary_name_is_hidden_and_never_too_long(tmp_path):
    for name in ("run", "n" * 255, "é" * 127):
        temporary = paths.temporary_beside(tmp_path / name, "host")
        temporary.write_bytes(b"")
        assert temporary.parent == tmp_path and temporary.name.startswith(f".{name[:20]}")


FILES = ("a[b]c/x.txt", "abc/x.txt", "d/e?f.txt", "d/e1f.txt", "d/*", "d/[1].txt", "d/1.txt", "g,h/i.txt", "~j/k.txt")
PATTERNS = {
    "a[b]c/*.txt": ["a[b]c/x.txt"],
    "a[b]c/x.txt": ["a[b]c/x.txt"],
    "ab[c]/x.txt": ["abc/x.txt"],
    "?[b]c/x.txt": ["abc/x.txt"],
    "a*/*.txt": ["a[b]c/x.txt", "abc/x.txt"],
    "**/x.txt": ["a[b]c/x.txt", "abc/x.txt"],
    "d/e?f.txt": ["d/e?f.txt"],
    "d/e[1?]f.txt": ["d/e1f.txt", "d/e?f.txt"],
    "d/*": ["d/*", "d/1.txt", "d/[1].txt", "d/e1f.txt", "d/e?f.txt"],
    "d/[1].txt": ["d/[1].txt"],
    "g,h/*": ["g,h/i.txt"],
    "~j/*": ["~j/k.txt"],
}


def test_existing_names_are_not_interpreted_as_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a")
    for pattern, names in PATTERNS.items():
        for start in (f"{tmp_path}/", f"{tmp_path}//", "./"):
            assert matching_files("", start + pattern) == [f"{tmp_path}/{name}" for name in names], pattern
    for pattern in ("abc/[y].txt", "a\0b", "n" * 300, f"{'n' * 300}/*"):
        with pytest.raises(DataError, match="no file matches"):
            matching_files("text:a", pattern)


@pytest.mark.parametrize(
    "text, sources",
    [
        ("text:/a,b/*.txt", ["text:/a,b/*.txt"]),
        ("text:a,text:b,c", ["text:a", "text:b,c"]),
        ("python_stdlib,text:a, b.txt,python_stdlib", ["python_stdlib", "text:a, b.txt", "python_stdlib"]),
        ("tfds:a/b:1.0.0,hf:c/d", ["tfds:a/b:1.0.0", "hf:c/d"]),
        ("text:a,", ["text:a", ""]),
    ],
)
def test_a_comma_separates_sources_only_before_a_source_type(text, sources):
    values = {}
    loader.override(values, "data.source", text)
    assert list(values["data"]["source"]) == sources


def test_a_source_that_is_no_utf8_is_refused():
    with pytest.raises(ConfigError, match=f"data.source=.* {TEXT}"):
        loader.resolve({"data": {"source": ["text:a\udcff/x.txt"]}})


def test_text_from_outside_becomes_one_printable_line(command):
    text = "é\u4e2d\U0001f600 a\nb\r\x1b[31m\u202e\u2028\x9b\x7f\0\udcff\\n"
    assert printable(text) == "é\u4e2d\U0001f600 a\\nb\\r\\u001b[31m\\u202e\\u2028\\u009b\\u007f\\u0000\\udcff\\n"
    assert printable("a\n\tb\x1b", kept="\n\t") == "a\n\tb\\u001b"
    assert printable("ab" * 5000) == "ab" * 5000 and len(printable("ab" * 5000, longest=2000)) < 2010
    code, _, err = command("evaluate", "--workdir=no\nwhere\x1b]0;title\x07")
    assert code == 4 and err == (
        "t5like: --workdir="
        + os.path.abspath("no\\nwhere\\u001b]0;title\\u0007")
        + " holds no run; train first, or check the path\n"
    )
