"""The command line of `t5like launch`, the site's file, and values of flags."""

import re

import pytest

from launch import flag_table, flag_values, options, site_file
from launch.job import Mount, Secret
from launch.options import parse_arguments
from launch.record import BACKENDS
from t5like.errors import ConfigError

TRAIN = ("--", "train", "--config=tiny", "--workdir=/runs/My_run")


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No launch.toml of the machine that runs the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))


def job(*arguments: str):
    return parse_arguments([*arguments, *TRAIN]).job


def test_flags_become_the_fields_of_a_job():
    made = job("slurm", "--accelerator=h100:8", "--nodes=4", "--time_limit=1d12h", "--env=A=1", "--secret=TOKEN_X",
               "--mount=gs://b:/data:ro", "--setup=module load a", "--setup=b", "--partition=gpu")  # fmt: skip
    assert (made.accelerator, made.nodes, made.gpus_per_node) == ("h100:4x8", 4, 8)
    assert made.time_limit == 36 * 3600 and made.partition == "gpu" and made.setup == ("module load a", "b")
    assert made.env == (("A", "1"),) and made.secrets == (Secret("TOKEN_X"),)
    assert made.mounts == (Mount("gs://b", "/data", True),)
    assert made.name == "my-run" and made.command == ("train", "--config=tiny", "--workdir=/runs/My_run")


def test_a_tpu_slice_has_its_hosts():
    assert job("kubernetes", "--accelerator=v5e:16x16", "--slices=2", "--image=a:1").num_processes == 128


def test_a_relative_run_directory_becomes_absolute_where_the_machines_see_this_one(tmp_path):
    made = parse_arguments(["local", "--", "train", "--workdir", "runs/a", "--config=tiny", "--fake_devices=2"]).job
    assert made.workdir == f"{tmp_path}/runs/a" and made.command[-1] == f"--workdir={tmp_path}/runs/a"
    assert made.fake_devices == 2 and "--fake_devices=2" not in made.command


REFUSED = [
    (("local", "train"), "launch local needs -- and the command"),
    (("foo", *TRAIN), "invalid choice: 'foo'"),
    (("local", "--", "train", "--config=tiny"), "needs --workdir"),
    (("local", "--", "trian", "--config=tiny"), "export, plan, inspect; did you mean train?"),
    (("local", "--", "configs"), "launch local -- configs: a job is one of the commands train, rl, prepare, "),
    (("local", "--partition=gpu", *TRAIN), "--partition goes with slurm, not with launch local"),
    (("slurm", "--partion=gpu", *TRAIN), "did you mean --partition?"),
    (("slurm", "--time_limit=30", *TRAIN), "--time_limit=30 must be a duration"),
    (("slurm", "--nodes=0", *TRAIN), "--nodes=0 must be a whole number, at least 1"),
    (("slurm", "--nodes=3", "--accelerator=h100:2x8", *TRAIN), "--nodes=3 differs from --accelerator=h100:2x8"),
    (("slurm", "--processes_per_node=4", "--accelerator=h100:2x8", *TRAIN), "must be 1 or 8, the GPUs of a host"),
    (("kubernetes", "--accelerator=v5e:3x3", *TRAIN), "--accelerator=v5e:3x3 is no slice of v5e"),
    (("slurm", "--accelerator=b300:8", *TRAIN), "--accelerator=b300:8 must be cpu"),
    (("slurm", "--env=WANDB_API_KEY=x", *TRAIN), "use --secret=WANDB_API_KEY"),
    (("kubernetes", "--env=MY_TOKEN=x", *TRAIN), "use --secret=MY_TOKEN=my-secret/key, a Secret of the namespace"),
    (("tpu_vm", "--env=MY_TOKEN=x", *TRAIN), "use --secret=MY_TOKEN=my-secret, the name in Secret Manager"),
    (("slurm", "--env=HTTPS_PROXY=http://me:x@proxy:3128", *TRAIN), "--env=HTTPS_PROXY is a URL with a password"),
    (("slurm", "--nodes=\u0661", *TRAIN), "must be a whole number"),
    (("slurm", "--python=", *TRAIN), "--python= must be the path or name of a program"),
    (("slurm", "--compile_cache=cache", *TRAIN), "--compile_cache=cache must be absolute"),
    (("slurm", "--skip_plans", *TRAIN), "launch slurm has no argument --skip_plans; did you mean --skip_plan?"),
    (("slurm", "--env=A-B=x", *TRAIN), "--env='A-B' must match"),
    (("slurm", "--env=T5LIKE_PROCESS_ID=1", *TRAIN), "is set for each process"),
    (("slurm", "--env=NOT_SET_ANYWHERE", *TRAIN), "is not set in this shell"),
    (("slurm", "--env=A=1", "--secret=A", *TRAIN), "--env=A is given by --secret as well"),
    (("slurm", "--image=repository/t5like", *TRAIN), "must end with a tag"),
    (("slurm", "--image=host:5000/t5like", *TRAIN), "must end with a tag"),
    (("slurm", "--image=-x:1", *TRAIN), "must end with a tag or a digest"),
    (("slurm", "--container=docker", *TRAIN), "must be pyxis or apptainer"),
    (("slurm", "--mount=data:/data", *TRAIN), "must begin with gs://"),
    (("slurm", "--mount=/data:../data", *TRAIN), "must be SOURCE:PATH"),
    (("kubernetes", "--spot=yes", *TRAIN), "--spot=yes must be true or false"),
    (("local", "--name=My run", *TRAIN), "--name='My run' must match"),
    (("local", "--directory=here", *TRAIN), "--directory=here must be absolute"),
    (("local", "--fake_devices=2", *TRAIN, "--fake_devices=4"), "--fake_devices=4 is another number"),
    (("kubernetes", "--", "train", "--workdir=runs/a"), "must be absolute in a job of kubernetes"),
    (("status", "runs/a", *TRAIN), "launch status takes no command"),
    (("local", "--site=none.toml", *TRAIN), "--site=none.toml can't be read"),
    (("local", "--account", "x", *TRAIN), "--account goes with slurm"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_wrong_arguments_are_refused_in_one_line(arguments, message):
    with pytest.raises(ConfigError) as error:
        parse_arguments(arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


HOSTILE = ["a'b\"c", "$(id)", "`id`", "; rm", "#SBATCH --x", "-x", "{{a}}", "a b", "x" * 300, "é", "$HOME", "\\"]
TWO_LINES = ["a\nb", "a\rb", "a\u2028b", "a\u0085b", "a\x00b", "a\x1b[0m", "a\udc80", "x" * 5000]


@pytest.mark.parametrize("value", HOSTILE)
def test_a_value_of_one_line_arrives_unchanged(value):
    made = parse_arguments(["local", f"--env=A={value}", *TRAIN, f"--config.data.source=text:{value}"]).job
    assert made.env == (("A", value),) and made.command[2] == f"--config.data.source=text:{value}"


@pytest.mark.parametrize("value", TWO_LINES)
def test_a_value_that_is_not_one_line_is_refused(value):
    for arguments in (
        ["local", f"--env=A={value}", *TRAIN],
        ["slurm", f"--account={value}", *TRAIN],
        ["slurm", f"--setup={value}", *TRAIN],
        ["local", *TRAIN, f"--config.data.source=text:{value}"],
        ["local", "--", "train", f"--workdir=/runs/{value}"],
    ):
        with pytest.raises(ConfigError, match="must be one line of text|use at most 4096") as error:
            parse_arguments(arguments)
        assert "\n" not in str(error.value) and "\r" not in str(error.value)


def test_durations_have_units():
    cases = {"0": 0, "90s": 90, "45m": 2700, "12h": 43200, "2d": 172800, "1d12h30m": 131400}
    assert {text: flag_values.duration("x", text) for text in cases} == cases


def test_names_of_secrets_are_recognized_by_their_words():
    secret = ["WANDB_API_KEY", "HF_TOKEN", "PGPASSWORD", "AWS_SECRET_ACCESS_KEY", "client_secret"]
    secret += ["PGPASS", "PASS", "DB_PASS", "SSH_PASSPHRASE"]
    assert all(flag_values.SECRET_NAME.search(name) for name in secret)
    assert not any(
        flag_values.SECRET_NAME.search(name)
        for name in ("TOKENIZERS_PARALLELISM", "KEYBOARD", "PATH", "COMPASS", "SSH_AUTH_SOCK", "PASSES")
    )


def test_every_flag_has_a_help_with_an_example_that_it_accepts(monkeypatch):
    for option in flag_table.OPTIONS.values():
        assert "such as --" in option.help and (option.kind != "number" or "at least" in option.help)
        option.convert(option.example.strip("'"), option.backends[0])
    for backend in BACKENDS:
        help_text = re.sub(
            r"\s+", " ", options.build_parser()._subparsers._group_actions[0].choices[backend].format_help()
        )
        assert all(
            (f"--{flag} " in help_text) == (backend in option.backends) for flag, option in flag_table.OPTIONS.items()
        )


SITE = """
[default]
env = ["A=1", "B=2"]
image = "a:1"
[slurm]
partition = "gpu"
nodes = 2
setup = ["module load a"]
[kubernetes]
spot = true
"""


def test_flags_win_over_the_file_of_the_site_and_lists_are_joined(tmp_path):
    (tmp_path / "launch.toml").write_text(SITE)
    made = job("slurm", "--partition=cpu", "--env=B=3", "--setup=b")
    assert (made.partition, made.nodes, made.image, made.setup) == ("cpu", 2, "a:1", ("module load a", "b"))
    assert dict(made.env) == {"A": "1", "B": "3"}
    assert job("local").image == "" and job("kubernetes").spot


def test_the_file_of_the_user_is_used_if_the_directory_has_none(tmp_path):
    (tmp_path / ".config/t5like").mkdir(parents=True)
    (tmp_path / ".config/t5like/launch.toml").write_text('[slurm]\nqos = "long"\n')
    assert job("slurm").qos == "long"
    (tmp_path / "other.toml").write_text("[slurm]\n")
    assert job("slurm", "--site=other.toml").qos == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[slurm]\npartion = "a"', "launch.toml: partion is no option of [slurm]; did you mean partition?"),
        ('[slrum]\npartition = "a"', "[slrum] is no table of it; did you mean slurm?"),
        ('partition = "a"', "partition must be in a table; put it below [default] or [slurm]"),
        ("slurm = 1", "slurm=1 must be a table; use [slurm]"),
        ('[local]\npartition = "a"', "partition is no option of [local]"),
        ("[slurm]\nnodes = 1.5", "nodes=1.5 in [slurm] must be a text"),
        ("[slurm]\nnodes = 0", "launch.toml: --nodes=0 must be a whole number"),
        ('[slurm]\nenv = ["HF_TOKEN=x"]', "launch.toml: --env=HF_TOKEN has the name of a secret"),
        ("[slurm", "launch.toml is not TOML"),
    ],
)
def test_a_wrong_file_of_the_site_is_refused_by_its_name(tmp_path, text, message):
    (tmp_path / "launch.toml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        job("slurm")


def test_places_of_the_site_file_are_those_of_the_help():
    help_text = options.build_parser()._subparsers._group_actions[0].choices["local"].format_help()
    assert all(place in help_text for place in site_file.PLACES)
