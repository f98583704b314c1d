"""What SECURITY.md promises: nothing that a user loads is executed, and secrets of the environment are not written."""

import ast
import re

from documents import ROOT

from t5like.optim import step

FOLDERS = ("t5like", "configs", "benchmarks", "tests")
CALLS = {  # name, as written in a call, -> whether all calls of it are forbidden
    "eval", "exec", "compile", "__import__",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open", "dill.load",
    "dill.loads", "cloudpickle.load", "cloudpickle.loads", "joblib.load", "torch.load", "yaml.load", "yaml.load_all",
    "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
    "runpy.run_path", "runpy.run_module", "importlib.import_module",
}  # fmt: skip
KEYWORDS = {("trust_remote_code", True), ("allow_pickle", True), ("shell", True), ("weights_only", False)}
# Where one of them is needed: the file, what it calls, and what it runs there.
ALLOWED = {
    ("tests/test_run.py", "exec"): "the cells of docs/notebook.ipynb",
    ("t5like/config/loader.py", "exec_module"): "a config file in Python, which is code: README.md says so",
    ("t5like/data/sources/small_functions.py", "eval"): "expressions that the module itself makes",
    ("t5like/rl/rewards/functions.py", "importlib.import_module"): "a reward function of the user, which is code",
    ("t5like/rl/rewards/worker.py", "pickle.loads"): "messages of the process that started this one",
    ("t5like/rl/rewards/sandbox_server.py", "compile"): "answers and their tests, in a sandbox",
    ("t5like/rl/rewards/sandbox_server.py", "exec"): "answers and their tests, in a sandbox",
    ("tests/rl/rewards/test_rewards.py", "pickle.loads"): "a copy, as worker processes get it",
    ("tests/data/sources/test_python_tasks.py", "exec"): "functions and tests of this repository",
    ("tests/instrumented_run.py", "pickle.load"): "records that the test itself wrote",
    ("tests/data/tokenizers/test_huggingface_model.py", "pickle.loads"): "a copy, as worker processes get it",
    ("tests/data/sources/test_csv_files.py", "pickle.loads"): "a copy, as worker processes get it",
    ("tests/data/sources/test_sources.py", "pickle.loads"): "a copy, as worker processes get it",
    ("tests/data/sources/test_python_tasks.py", "importlib.import_module"): "the standard library",
    ("tests/data/sources/test_python_tasks.py", "eval"): "a value of the standard library",
    ("tests/cli/test_main.py", "runpy.run_path"): "setup.py of this repository",
    ("tests/test_documents.py", "importlib.import_module"): "modules of this repository",
    ("tests/test_documents.py", "exec_module"): "scripts of this repository",
}


def forbidden(source: str) -> list[str]:
    """The forbidden calls and keywords in a module, by name."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name.startswith("yaml.load") and any(ast.unparse(each).endswith("SafeLoader") for each in node.args):
                continue
            names += [name] if name in CALLS else ["exec_module"] * name.endswith(".exec_module")
            for keyword in node.keywords:
                if isinstance(keyword.value, ast.Constant) and (keyword.arg, keyword.value.value) in KEYWORDS:
                    names.append(f"{keyword.arg}={keyword.value.value}")
        elif isinstance(node, ast.ImportFrom) and node.module in ("pickle", "marshal", "dill", "cloudpickle", "joblib"):
            names.append(f"from {node.module}")
    return names


def test_no_module_calls_what_executes_loaded_data():
    wrong = "from pickle import loads\neval(a)\nos.system(b)\nf(shell=True)\ntorch.load(c)\nyaml.load(d)\n"
    assert len(forbidden(f"{wrong}f(allow_pickle=True)\nspec.loader.exec_module(m)\n")) == 8
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 200
    called = {
        (path.relative_to(ROOT).as_posix(), name) for path in paths for name in forbidden(path.read_text("utf-8"))
    }
    assert called - ALLOWED.keys() == set(), "use a data format; if the input is this repository's own, add it above"
    assert ALLOWED.keys() - called == set(), "no longer called"


def test_readme_and_security_say_that_a_config_file_is_code():
    for name in ("README.md", "SECURITY.md"):
        text = " ".join((ROOT / name).read_text("utf-8").split())
        assert re.search(r"config(uration)? (file )?in Python is code", text), name


SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DATABASE_PASSWORD", "T5LIKE_RENDEZVOUS_SECRET")
VALUE = "zq7planted{}Xv"


def test_secrets_of_the_environment_are_in_no_file_of_a_run_no_log_and_no_error(
    command, decoder_flags, monkeypatch, tmp_path
):
    """The files and the output of commands in an environment with secrets: good, refused, failed."""
    for number, name in enumerate(SECRETS):
        monkeypatch.setenv(name, VALUE.format(number))
    train = ["train", *decoder_flags, "--config.train.num_steps=1", "--debug"]
    commands = [
        [*train, f"--workdir={tmp_path}/run"],
        [*train, f"--workdir={tmp_path}/run", "--config.optimizer.learning_rate=7"],
        ["evaluate", f"--workdir={tmp_path}/run", "--debug"],
        ["export", "--format=hf", f"--workdir={tmp_path}/nowhere", f"--output={tmp_path}/out", "--debug"],
    ]
    ended = [command(*arguments) for arguments in commands]
    monkeypatch.setattr(step, "compile_train_step", lambda *_: 1 / 0)
    ended.append(command(*train, f"--workdir={tmp_path}/failed"))
    output = "".join(out + err for _, out, err in ended)
    assert [code for code, _, _ in ended] == [0, 2, 0, 4, 70] and "ZeroDivisionError" in output, output
    assert VALUE.partition("{")[0] not in output
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.json", "metrics.jsonl", "provenance.jsonl"} <= {path.name for path in files}
    for path in files:
        assert VALUE.partition("{")[0].encode() not in path.read_bytes(), path
