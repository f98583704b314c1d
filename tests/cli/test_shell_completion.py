"""`t5like completion`, in a real bash."""

import subprocess

import pytest

from t5like.cli import completion

# Words up to the cursor, as bash splits them, and the completions.
CASES = [
    ("t5like|tr", "train "),
    ("t5like|train|--wo", "--workdir="),
    ("t5like|train|--config|=|tin", "tiny "),
    ("t5like|train|--config.op", "--config.optimizer."),
    ("t5like|train|--config.data.object", "--config.data.objective=|--config.data.objective_rates="),
    ("t5like|train|--config.data.objective|=|sp", "span_corruption "),
    ("t5like|train|--config.data.objective=sp", "--config.data.objective=span_corruption "),  # as zsh splits
    ("t5like|train|--config.model.biases|=", "true |false "),
    ("t5like|inspect|ch", "checkpoint "),
    ("t5like|inspect|checkpoint|--ver", "--verify "),
    ("t5like|import|--format|=|", "hf |t5x "),
    ("t5like|export|--format|=|", "hf |peft |stablehlo "),
    ("t5like|launch|sl", "slurm "),
    ("t5like|launch|slurm|--dr", "--dry_run "),
    ("t5like|launch|slurm|--|train|--config.model.norm|=|r", "rms "),
    ("t5like|replay|--config", ""),  # it takes the run's own
    ("t5like|train|--workdir|=|./ru", "./runs/"),
    ("t5like|nothing|--", ""),
]


@pytest.fixture(scope="module")
def completed(tmp_path_factory) -> list[str]:
    """What bash completes in each case, joined by |."""
    folder = tmp_path_factory.mktemp("completion")
    (folder / "runs").mkdir()
    (folder / "script").write_text(completion.script("bash"))
    quoted = ["'" + "' '".join(words.split("|")) + "'" for words, _ in CASES]
    show = "_t5like; IFS='|'; echo \"${COMPREPLY[*]}\"; unset IFS"
    lines = [f"COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )); {show}" for words in quoted]
    program = "\n".join(["source ./script", *lines, "complete -p t5like"])
    done = subprocess.run(["bash", "-uc", program], cwd=folder, capture_output=True, text=True)
    assert done.stderr == "" and done.returncode == 0
    return done.stdout.splitlines()


@pytest.mark.parametrize("number", range(len(CASES)), ids=[words for words, _ in CASES])
def test_bash_completes(completed, number):
    assert completed[number] == CASES[number][1]


def test_the_command_prints_the_script_and_registers_it(command, refused, completed):
    assert completed[-1] == "complete -o nospace -F _t5like t5like"
    assert command("completion", "bash")[:2] == (0, completion.script("bash"))
    assert "bashcompinit" in command("completion", "zsh")[1]
    assert refused("completion", "fish")[1].startswith("argument shell: invalid choice: 'fish'")
