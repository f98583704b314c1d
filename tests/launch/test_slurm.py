"""Batch scripts of Slurm: golden files, hostile values and exit codes, run by bash with recording stand-ins of Slurm's
programs; and what is submitted. `tests/cluster` runs them on a real Slurm.

    python tests/launch/test_slurm.py     writes the golden files
"""

import dataclasses
import os
import stat
import subprocess
from pathlib import Path

import pytest

from launch import slurm
from launch.job import RESTART_CODES, STOP_CODES, JobSpec, Mount, Secret, SweepRun
from launch.record import Record
from t5like.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "golden/launch/slurm"
TRAIN = ("train", "--config=t5_small", "--workdir=/shared/runs/a")
CPU = JobSpec("a", TRAIN, "/shared/runs/a")
GPUS = dataclasses.replace(
    CPU,
    command=("train", "--config=t5_xxl", "--workdir=/shared/runs/a"),
    accelerator="h100:8x8",
    nodes=8,
    cpus_per_process=96,
    memory_gib=1000,
    time_limit=86400,
    compile_cache="/shared/jax_cache",
    env=(("LOG_LEVEL", "info"),),
    secrets=(Secret("WANDB_API_KEY"),),
    setup=("module load cuda/12",),
    account="lab",
    partition="gpu",
)
JOBS = {
    "cpu": CPU,
    "h100_process_per_host": GPUS,
    "h100_process_per_gpu": dataclasses.replace(GPUS, processes_per_node=8, cpus_per_process=12, gres="gpu:h100:8"),
    "array": dataclasses.replace(
        CPU,
        runs=tuple(
            SweepRun(f"rate_{rate}", (f"--config.optimizer.learning_rate={rate}",)) for rate in (0.1, 0.01, 1e-3)
        ),
    ),
    "pyxis": dataclasses.replace(
        GPUS, image="registry.example/t5like:1.0", container="pyxis", mounts=(Mount("/data", "/data", read_only=True),)
    ),
    "apptainer": dataclasses.replace(
        GPUS,
        image="/images/t5like.sif",
        container="apptainer",
        mounts=(Mount("/shared", "/shared"),),
        directory="/work",
    ),
}
SRUN = '#!/bin/bash\nprintf "%s\\0" "$@" >"$OUT/words"\nenv -0 >"$OUT/env"\nexit "$CODE"\n'
SCONTROL = '#!/bin/bash\necho "$*" >>"$OUT/scontrol"\necho "JobId=7 JobName=a JobState=$STATE Reason=None Restarts=0"\n'
HOSTILE = [
    'it\'s "quoted" \\',
    "$(touch BROKEN) `touch BROKEN` ${HOME}",
    "a; touch BROKEN & | > <",
    "#SBATCH --nodes=9",
    "-leading",
    "{{ template }} %j %A",
    "x" * 300,
    "ünïcode \u00a0 *?[a]~",
]


@pytest.fixture
def bash(tmp_path, monkeypatch):
    """Run a script with stand-ins of srun and scontrol; returns exit code, stderr, srun's arguments and environment."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def run(script: str, code: int = 0, state: str = "RUNNING", **environment: str):
        slurm_variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "a", "SLURM_JOB_NODELIST": "n1"}
        done = subprocess.run(
            ["bash", "-s"],
            input=script.encode(),
            cwd=tmp_path,
            env={**slurm_variables, "PATH": f"{programs}:{os.environ['PATH']}", "HOME": "/home/me"}
            | {"OUT": str(tmp_path), "CODE": str(code), "STATE": state, **environment},
            capture_output=True,
            check=False,
        )
        read = lambda name: (tmp_path / name).read_bytes().decode() if (tmp_path / name).exists() else ""
        variables = dict(part.partition("=")[::2] for part in read("env").split("\0"))
        return done.returncode, done.stderr.decode(), read("words").split("\0")[:-1], variables

    return run


@pytest.fixture
def job(tmp_path) -> JobSpec:
    """A job whose run directory has a checkpoint."""
    workdir = tmp_path / "run"
    (workdir / "checkpoints" / "20").mkdir(parents=True)
    (workdir / "checkpoints" / "20" / "commit_success.txt").touch()
    (workdir / "logs").mkdir()
    return dataclasses.replace(CPU, command=("train", f"--workdir={workdir}"), workdir=str(workdir), retries=2)


@pytest.mark.parametrize("name", JOBS)
def test_scripts_are_those_of_the_golden_files(name):
    slurm.check(JOBS[name])
    assert slurm.render(JOBS[name]) == (GOLDEN / f"{name}.sh").read_text()


@pytest.mark.parametrize("value", HOSTILE)
def test_any_value_arrives_byte_for_byte(bash, job, tmp_path, value):
    command = (*job.command, value, f"--config.data.source=text:{value}")
    job = dataclasses.replace(job, command=command, env=(("VALUE", value),), compile_cache=f"/{value}")
    slurm.check(job)
    code, error, arguments, variables = bash(slurm.render(job))
    assert code == 0, error
    assert arguments[-len(command) :] == list(command)
    assert (variables["VALUE"], variables["JAX_COMPILATION_CACHE_DIR"]) == (value, f"/{value}")
    assert not (tmp_path / "BROKEN").exists()
    options = [line for line in slurm.render(job).splitlines() if line.startswith("#SBATCH")]
    assert options == [line for line in slurm.render(job).splitlines()[2:] if line][: len(options)]
    assert "--nodes=9" not in " ".join(options)


@pytest.mark.parametrize("value", [*HOSTILE[:6], "a\n#SBATCH --nodes=9", "a b", "é", "a\u2028b"])
@pytest.mark.parametrize("field", ["account", "partition", "qos", "reservation", "constraint", "gres", "log_directory"])
def test_a_value_that_no_option_of_sbatch_can_carry_is_refused(field, value):
    with pytest.raises(ConfigError) as refusal:
        slurm.check(dataclasses.replace(CPU, **{field: value}))
    assert str(refusal.value).startswith(f"--{field}=") and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"accelerator": "v5e:4x4", "nodes": 4}, "--accelerator=v5e:4x4 is no host of Slurm; use --accelerator=h100:8"),
        ({"grace": 70000}, "--grace=70000 must be at least 1 and at most 65535 s; use --grace=120"),
        ({"time_limit": 100}, "--grace=120 s must be shorter than --time_limit=100 s; use --grace=50"),
        ({"secrets": (Secret("TOKEN", "a/b"),)}, "use --secret=TOKEN"),
        ({"image": "a/b:1.0"}, "--image=a/b:1.0 needs --container=pyxis"),
        ({"container": "pyxis"}, "--container=pyxis needs --image=registry.example/t5like:1.0"),
        ({"mounts": (Mount("/a", "/b"),)}, "--mount=/a needs a container"),
        ({"image": "a@sha256:0", "container": "pyxis"}, "Pyxis takes a tag, not a digest"),
        (
            {"image": "a:1", "container": "apptainer", "mounts": (Mount("gs://bucket", "/b"),)},
            "--mount='gs://bucket' must be a directory of the hosts",
        ),
        (
            {"image": "a:1", "container": "apptainer", "mounts": (Mount("/a,b", "/b"),)},
            "'/a,b' has a comma or colon, which separate mounts",
        ),
        ({"workdir": "gs://bucket/run"}, "add --log_directory=/shared/logs"),
    ],
)
def test_what_slurm_cannot_do_is_refused_in_one_line(change, message):
    with pytest.raises(ConfigError) as refusal:
        slurm.check(dataclasses.replace(CPU, **change))
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("code", [0, *STOP_CODES, 1, 126, 127, 255])
def test_these_exit_codes_end_the_job(bash, job, tmp_path, code):
    result, error, *_ = bash(slurm.render(job), code)
    assert result == code and "requeue" not in (tmp_path / "scontrol").read_text()
    assert ("does not start again" in error) == (code != 0)


@pytest.mark.parametrize("code, counts", [(75, False), (76, True), (137, True), (139, True), (213, True)])
def test_these_exit_codes_start_the_job_again(bash, job, tmp_path, code, counts):
    job = dataclasses.replace(job, command=("train", f"--workdir={job.workdir}"), python=str(tmp_path / "save"))
    save = "#!/bin/bash\nmkdir -p run/checkpoints/40; touch run/checkpoints/40/commit_success.txt\n"
    script = slurm.render(job).replace(
        'wait "$task"\ncode=$?', f'{save.partition(chr(10))[2].strip()}\nwait "$task"\ncode=$?'
    )
    result, error, *_ = bash(script, code)
    assert result == code and "requeue 7" in (tmp_path / "scontrol").read_text().splitlines()
    assert f"the job starts again: {int(counts)} of 2 restarts are used" in error
    assert (tmp_path / "run/logs/a-7.restarts").exists() == counts
    assert set(RESTART_CODES) <= {75, 76}


def test_restarts_without_a_new_checkpoint_end_after_the_retries(bash, job, tmp_path):
    incomplete = 'mkdir -p run/checkpoints/40\nwait "$task"\ncode=$?'
    for used in (1, 2):
        _, error, *_ = bash(slurm.render(job).replace('wait "$task"\ncode=$?', incomplete), 75)
        assert f"saved, without a new checkpoint; the job starts again: {used} of 2 restarts are used" in error
    (tmp_path / "scontrol").unlink()
    code, error, *_ = bash(slurm.render(job), 75)
    assert code == 75 and "the job ends: 2 of 2 restarts are used" in error
    assert "requeue" not in (tmp_path / "scontrol").read_text()


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING"])
def test_a_job_that_slurm_ends_is_not_queued_again_by_its_script(bash, job, tmp_path, state):
    code, *_ = bash(slurm.render(job), 75, state)
    assert code == 75 and "requeue" not in (tmp_path / "scontrol").read_text()


def test_a_task_of_an_array_runs_and_queues_its_own_run(bash, job, tmp_path):
    runs = (SweepRun("a", ("--config.seed=1",)), SweepRun("b'$(id)", ("--config.seed=2",)))
    job = dataclasses.replace(job, runs=runs)
    variables = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "1"}
    code, _, arguments, _ = bash(slurm.render(job), 76, **variables)
    assert code == 76 and "requeue 6_1" in (tmp_path / "scontrol").read_text().splitlines()
    assert arguments[-3:] == ["train", f"--workdir={job.workdir}/b'$(id)", "--config.seed=2"]
    assert (tmp_path / "run/logs/a-6_1.restarts").read_text() == "1\n"


def test_a_secret_must_be_set_and_is_never_written(bash, job, monkeypatch, tmp_path):
    job = dataclasses.replace(job, secrets=(Secret("HF_TOKEN"),))
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    script = slurm.render(job)
    assert "#SBATCH --export=HF_TOKEN\n" in script and "s3cret" not in script
    code, error, arguments, _ = bash(script)
    assert code != 0 and "HF_TOKEN: is not set in the shell that submitted the job" in error and not arguments
    code, _, _, variables = bash(script, HF_TOKEN="s3cret")
    assert code == 0 and variables["HF_TOKEN"] == "s3cret"


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Stand-ins of Slurm's programs on PATH; returns a function that sets what one prints and its exit code."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")

    def program(name: str, output: str, *, error: str = "", code: int = 0) -> Path:
        (tmp_path / f"{name}.out").write_text(output)
        (tmp_path / f"{name}.err").write_text(error)
        text = f'#!/bin/sh\necho "$@" >>{tmp_path}/{name}.arguments\ncat {tmp_path}/{name}.out\n'
        (programs / name).write_text(text + f"cat {tmp_path}/{name}.err >&2\nexit {code}\n")
        (programs / name).chmod(0o755)
        return tmp_path / f"{name}.arguments"

    program("sinfo", "main*|1/1/0/2\nbig|0/8/0/8\n")
    program("sbatch", "1234;cluster\n")
    return program


def test_submit_keeps_a_private_script_and_returns_the_commands(cluster, job):
    submission = slurm.submit(job, "#!/bin/bash\n")
    script = Path(job.workdir) / "logs/a.sh"
    assert script.read_text() == "#!/bin/bash\n" and stat.S_IMODE(script.stat().st_mode) == 0o600
    log = f"{job.workdir}/logs/a-1234.log"
    assert (submission.id, submission.logs) == ("1234", log)
    assert submission.lines["cancel"] == "scancel 1234" and submission.lines["follow"] == f"tail -n +1 -F {log}"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"partition": "gpu"}, "--partition=gpu does not exist; use one of main, big"),
        ({"nodes": 3}, "--nodes=3 must be at most 2, all of main; use --nodes=2"),
        ({"nodes": 9, "partition": "main,big"}, "--nodes=9 must be at most 8"),
        ({"secrets": (Secret("NOT_SET_HERE"),)}, "--secret=NOT_SET_HERE is not set in this shell; export NOT_SET_HERE"),
        ({}, "sbatch refused the job: error: Invalid account; nothing was submitted"),
    ],
)
def test_what_slurm_would_refuse_is_one_line(cluster, job, change, message):
    arguments = cluster("sbatch", "", error="sbatch: error: Invalid account\n", code=1)
    with pytest.raises(ConfigError) as refusal:
        slurm.submit(dataclasses.replace(job, log_directory=f"{job.workdir}/new", **change), "#!/bin/bash\n")
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
    assert arguments.exists() == (not change)
    assert not os.path.exists(f"{job.workdir}/new")


def test_without_slurm_nothing_is_submitted(job, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="sbatch is needed for jobs of Slurm and is not on PATH; install it"):
        slurm.submit(job, "#!/bin/bash\n")
    assert not (tmp_path / "run/logs/a.sh").exists()


STATES = """\
JobId=9 ArrayJobId=8 ArrayTaskId=1-2 JobName=a JobState=PENDING Reason=Resources Restarts=0 ExitCode=0:0 NodeList=(null)
JobId=8 ArrayJobId=8 ArrayTaskId=0 JobName=a JobState=FAILED Reason=NonZeroExitCode Restarts=2 ExitCode=3:0 NodeList=n1
"""


def test_status_is_one_line_per_task(cluster):
    cluster("scontrol", STATES)
    assert slurm.status(Record("slurm", "8")).splitlines() == [
        "slurm:8_1-2  PENDING (Resources), restarts 0",
        "slurm:8_0  FAILED (NonZeroExitCode) on n1, exit code 3, restarts 2",
    ]


def test_status_asks_accounting_about_a_job_that_the_controller_has_forgotten(cluster):
    cluster("scontrol", "", error="slurm_load_jobs error: Invalid job id specified\n", code=1)
    cluster("sacct", "8|CANCELLED by 0|0:15|n1\n")
    assert slurm.status(Record("slurm", "8")) == "slurm:8  CANCELLED on n1, exit code 143"
    cluster("sacct", "", error="Slurm accounting storage is disabled\n", code=1)
    with pytest.raises(ConfigError, match="slurm:8 is not known to Slurm: .*Invalid job id"):
        slurm.status(Record("slurm", "8"))


def test_the_log_is_followed_until_the_job_ends(cluster, job, capsys):
    log = Path(job.workdir) / "logs/a-8.log"
    log.write_text("step 1\n")
    cluster("scontrol", "JobId=8 JobName=a JobState=FAILED Reason=NonZeroExitCode ExitCode=3:0 Restarts=0")
    record = Record("slurm", "8", logs=str(log))
    assert slurm.logs(record, follow=True) == 3
    assert slurm.logs(record, follow=False) == 0
    out, err = capsys.readouterr()
    assert out == "step 1\nstep 1\n" and err == "slurm:8 is FAILED\n"


def test_cancel_calls_scancel_with_a_checked_number(cluster):
    arguments = cluster("scancel", "")
    slurm.cancel(Record("slurm", "8_1"))
    assert arguments.read_text() == "8_1\n"
    with pytest.raises(ConfigError, match="use slurm:1234"):
        slurm.cancel(Record("slurm", "--user=root"))


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, job in JOBS.items():
        (GOLDEN / f"{name}.sh").write_text(slurm.render(job))
