"""Checks before a submission."""

import os

import pytest

from launch import checks
from launch.job import JobSpec, Mount, SweepRun
from t5like.errors import ConfigError, DataError

FIELDS = ("--config.data.source=text:{}", "--config.tokenizer.vocab_size=400", "--config.tokenizer.num_sentinels=8")


@pytest.fixture
def job(tmp_path):
    """A job of two processes with two devices each, on text that exists, with changes."""
    (tmp_path / "a.txt").write_text("some words\n" * 10)
    cache = f"--config.data.cache_directory={tmp_path}/cache"

    def make(*flags: str, source: str = str(tmp_path / "*.txt"), **changes) -> JobSpec:
        own = [each.format(source) for each in FIELDS]
        command = ("train", "--config=tiny", *own, cache, *flags, f"--workdir={tmp_path}/run")
        fields = {"nodes": 2, "fake_devices": 2} | changes
        return JobSpec("a", command, f"{tmp_path}/run", **fields)

    return make


def check(job: JobSpec, backend: str = "local", *, skip_plan: bool = False, shared: bool = True) -> list[str]:
    return checks.check_job(job, backend, skip_plan=skip_plan, shared=shared)


def test_a_job_that_can_run_passes_with_a_note_about_data_to_prepare(job, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "before")
    [note] = check(job())
    assert "the token store does not exist yet" in note and os.environ["JAX_PLATFORMS"] == "before"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.train.step=1", "there is no field 'step'"),
        ("--stepp=1", "unrecognized arguments: --stepp=1"),
        ("--num_steps=1", "did you mean --config.train.num_steps=1?"),
        ("--config.data.batch_size=30", "data.batch_size=30 must be a multiple of 4"),
        ("--config.mesh.tensor=3", "mesh data"),
        ("--help", "must not be --help"),
    ],
)
def test_what_train_would_refuse_is_refused_before_the_submission(job, flag, message, capsys):
    with pytest.raises(ConfigError) as error:
        check(job(flag))
    assert message in str(error.value) and capsys.readouterr().out == ""


def test_nodes_that_do_not_divide_the_mesh_are_refused(job):
    with pytest.raises(ConfigError, match="does not fit 6 devices"):
        check(job("--config.mesh.data=4", nodes=3))


def test_a_model_that_does_not_fit_is_refused_with_the_memory_of_the_device(job):
    with pytest.raises(ConfigError, match=r"a device of v5e:2x2 has 15.8 GiB, and a training step needs about"):
        big = job(
            "--config.model.model_dim=8192",
            "--config.model.mlp_dim=65536",
            accelerator="v5e:2x2",
            nodes=1,
            fake_devices=0,
        )
        check(big, "tpu_vm")


def test_missing_data_is_refused_here_and_a_note_where_its_directory_does_not_exist(job, tmp_path):
    with pytest.raises(DataError, match="no file matches"):
        check(job(source=f"{tmp_path}/*.md"))
    notes = check(job(source="/cluster/only/here/*.txt"), "slurm")
    assert notes == ["/cluster/only/here/*.txt is not on this machine: data and tokenizer are not checked"]


def test_data_of_a_remote_machine_are_not_checked(job):
    [note] = check(job(source="/data/*.txt", accelerator="v5e:2x2", nodes=1, fake_devices=0), "kubernetes")
    assert note.startswith("data, tokenizer and run directory are where the job of kubernetes runs")


def test_a_config_of_the_image_is_a_note_and_a_preset_is_checked(job, tmp_path):
    own = JobSpec("a", ("train", "--config=/app/own.py", "--workdir=/data/a"), "/data/a")
    assert check(own, "kubernetes") == ["/app/own.py is not on this machine: the config is not checked"]
    with pytest.raises(ConfigError, match="no such file, and no preset"):
        check(JobSpec("a", ("train", "--config=tini", "--workdir=/data/a"), "/data/a"), "kubernetes")


def test_a_run_directory_of_another_run_is_refused(job, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/logs").mkdir()
    (tmp_path / "run/launch.json").touch()
    check(job())
    (tmp_path / "run/thesis.doc").touch()
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        check(job())


def test_skipping_is_noted_and_still_checks_the_command(job):
    [note] = check(job("--config.data.batch_size=30"), skip_plan=True)
    assert note.startswith("the checks of t5like plan were skipped")
    with pytest.raises(ConfigError, match="there is no field"):
        check(job("--config.train.step=1"), skip_plan=True)


def test_every_run_of_a_sweep_is_checked_and_named(job):
    good, bad = SweepRun("good", ("--config.seed=2",)), SweepRun("bad", ("--config.data.batch_size=30",))
    with pytest.raises(ConfigError, match="run bad of the sweep: data.batch_size=30 must be"):
        check(job(runs=(good, bad)))


def test_commands_without_a_config_are_parsed_only():
    assert check(JobSpec("a", ("evaluate", "--workdir=/runs/a"), "/runs/a")) == []


def test_a_run_directory_of_one_machine_is_refused_for_slurm_jobs_of_several(job):
    with pytest.raises(ConfigError, match="below /tmp, and 2 hosts need it; .* or --workdir_is_shared"):
        checks.check_workdir_is_shared(JobSpec("a", (), "/tmp/a", nodes=2), "slurm")
    for fine in (
        JobSpec("a", (), "/tmp/a"),
        JobSpec("a", (), "gs://b/a", nodes=2),
        JobSpec("a", (), "/tmp/a", nodes=2, mounts=(Mount("/shared", "/tmp"),)),
    ):
        checks.check_workdir_is_shared(fine, "slurm")
    checks.check_workdir_is_shared(JobSpec("a", (), "/tmp/a", nodes=2), "local")
    checks.check_workdir_is_shared(JobSpec("a", (), "/not-mounted-here/a", nodes=2), "slurm")


MOUNTS = """\
overlay / overlay rw 0 0
/dev/sda1 /home ext4 rw 0 0
server:/export /home/shared nfs4 rw 0 0
lustre /scratch\\040one lustre rw 0 0
"""


def test_the_file_system_of_a_path_is_that_of_the_longest_mount_point(tmp_path):
    table = tmp_path / "mounts"
    table.write_text(MOUNTS)
    paths = {"/home/me/a": "ext4", "/home/shared/a": "nfs4", "/home/sharedx": "ext4", "/opt": "overlay"}
    assert {path: checks.file_system(path, table) for path in paths} == paths
    assert checks.file_system("/scratch one/a", table) == "lustre" and checks.file_system("/", tmp_path / "no") == ""
