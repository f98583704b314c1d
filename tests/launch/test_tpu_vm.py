"""Jobs on TPU VMs: the script as text, the values that reach the workers, and refused requests."""

import dataclasses
from pathlib import Path

import pytest
from gcloud_stand_in import JOB, calls, ended, local_job, make_cloud, render, start

from launch import tpu_vm
from launch.job import Mount, Secret, SweepRun
from t5like.errors import ConfigError

GOLDEN = Path(__file__).parent.parent / "golden" / "launch" / "tpu_vm"
JOBS = {
    "v5p-512": dataclasses.replace(
        JOB,
        accelerator="v5p:4x8x8",
        spot=False,
        reserved=True,
        project="my-project",
        setup=(),
        image="registry.example/my-project/images/t5like:1.0",
        mounts=(Mount("gs://my-bucket", "/mnt/runs"),),
        secrets=(Secret("HF_TOKEN", "hf-token"),),
        env=(("XLA_FLAGS", "--xla_dump_to=/tmp/it's here"),),
        compile_cache="/mnt/runs/cache",
        time_limit=86400,
        service_account="trainer@my-project.iam.gserviceaccount.com",
    ),
    "two_slices_of_v5e-256": dataclasses.replace(
        JOB,
        accelerator="v5e:16x16",
        slices=2,
        spot=False,
        install="dist/t5like-0.1.0-py3-none-any.whl",
        python="python3.11",
        setup=("sudo apt-get install -y python3.11-venv",),
        mounts=(Mount("gs://my-bucket", "/mnt/runs"),),
        network="fast",
    ),
    "v6e-4_spot": JOB,
    "sweep": dataclasses.replace(
        JOB,
        workdir="/mnt/runs/sweep",
        command=("train", "--config=t5_small", "--workdir=/mnt/runs/sweep"),
        runs=(
            SweepRun("a", ("--config.optimizer.learning_rate=0.01",)),
            SweepRun("b", ("--config.optimizer.learning_rate=0.001",)),
        ),
    ),
}
HOSTILE = (
    "quotes ' \" ` \\ end", "$(id) ${HOME} `id`", "; exit 9 # && || | > < &", "{{x}} %s {0}", "-rf", "#SBATCH --x",
    "*  ?   [a-z] ~ !x", "END_OF_UPLOAD", "END_OF_WORKER_SCRIPT", "中文 ё \u00a0 😀", "x" * 300, "",
)  # fmt: skip


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """The folder that plays Google Cloud."""
    return make_cloud(tmp_path, monkeypatch)


@pytest.mark.parametrize("name", JOBS)
def test_the_script_is_that_of_the_golden_file(name):
    tpu_vm.check(JOBS[name])
    assert tpu_vm.render(JOBS[name]) == (GOLDEN / f"{name}.sh").read_text()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"accelerator": "h100:8"}, "--accelerator=h100:8 is no TPU"),
        ({"accelerator": "v5p:4x4x16"}, "use --accelerator=v5p:4x8x8"),
        ({"zone": ""}, "--zone='' must match .* use --zone=us-west4-a"),
        ({"zone": "a; rm -rf /"}, "--zone='a; rm -rf /' must match"),
        ({"name": "-x"}, "--name='-x' must match"),
        ({"project": "$(id)"}, "--project="),
        ({"image": "--privileged", "setup": ()}, "--image="),
        ({"reserved": True}, "--spot and --reserved exclude each other"),
        ({"setup": ()}, "TPU VMs start without t5like; use --image="),
        ({"install": "--index=x"}, "--install='--index=x' must be a requirement or a wheel"),
        ({"setup": ("END_OF_UPLOAD",)}, "--setup=END_OF_UPLOAD is a line of the script itself"),
        ({"setup": ("true\nfalse",)}, "without the character U\\+000A"),
        ({"env": (("X", "a\u2028b"),)}, "without the character U\\+2028"),
        ({"command": ("train", "--config=a\rb")}, "without the character U\\+000D"),
        ({"secrets": (Secret("HF_TOKEN"),)}, "use --secret=HF_TOKEN=my-secret, the name in Secret Manager"),
        ({"workdir": "/home/me/run"}, "--workdir='/home/me/run' is not on storage that the TPU VMs share"),
        ({"workdir": "/mnt/runs/../../home/run"}, "is not on storage that the TPU VMs share"),
        ({"mounts": (Mount("s3://b", "/mnt/runs"),)}, "must be gs://BUCKET or a path of the TPU VMs"),
        ({"mounts": (Mount("gs://RUNS", "/mnt/runs"),)}, "use --mount=gs://runs:/mnt/runs"),
        ({"mounts": (Mount("/a", "/mnt/runs"),)}, "needs a container"),
        ({"fake_devices": 2}, "--fake_devices would leave the TPUs unused"),
    ],
)
def test_what_tpu_vms_can_not_do_is_refused_in_one_line(fields, message):
    with pytest.raises(ConfigError, match=message) as error:
        tpu_vm.check(dataclasses.replace(JOB, **fields))
    assert "\n" not in str(error.value)


def test_every_worker_of_every_slice_gets_the_values_byte_for_byte(cloud):
    (cloud / "workers").write_text("2")
    (cloud / "secrets").mkdir()
    (cloud / "secrets" / "hf-token").write_text("the secret's $(value)\n")
    (wheel := cloud / "t5like-0.1.0-py3-none-any.whl").touch()
    command = ("train", f"--workdir={cloud}/runs/mine", *HOSTILE)
    env = tuple((f"HOSTILE_{index}", value) for index, value in enumerate(HOSTILE))
    fields = {"env": env, "secrets": (Secret("HF_TOKEN", "hf-token"),), "install": str(wheel), "slices": 2}
    code, output = ended(start(cloud, local_job(cloud, command=command, **fields)))
    assert code == 0, output
    files = sorted(cloud.glob("arguments.*"))
    assert [file.read_text().split("\0")[:-1] for file in files] == 4 * [["-m", "t5like", *command]]
    for file in cloud.glob("environment.*"):
        variables = dict(line.split("=", 1) for line in file.read_text().split("\0")[:-1])
        assert [variables[name] for name, _ in env] == list(HOSTILE)
        assert variables["HF_TOKEN"] == "the secret's $(value)"
    assert {file.read_text().split("\0")[-2] for file in cloud.glob("pip.*")} == {f"./{wheel.name}[tpu]"}
    kept = [cloud / "job.sh", cloud / "calls", *cloud.glob("runs/mine/logs/*")]
    assert len(kept) > 2 and "the secret's" not in output + "".join(file.read_text() for file in kept)
    assert [len(calls(cloud, action)) for action in ("create", "delete")] == [1, 1]
    assert not (cloud / "state").exists()


def test_a_container_gets_the_values_byte_for_byte(cloud, monkeypatch):
    monkeypatch.setenv("IMAGE", image := "registry.example/p/images/t5like:1.0")
    command = ("train", f"--workdir={cloud}/runs/mine", *HOSTILE)
    mounts = (Mount("gs://my-bucket", f"{cloud}/runs"),)
    code, output = ended(start(cloud, local_job(cloud, command=command, image=image, setup=(), mounts=mounts)))
    assert code == 0, output
    [file] = cloud.glob("arguments.*")
    assert file.read_text().split("\0")[:-1] == ["-m", "t5like", *command]


def test_a_gcloud_without_login_or_project_ends_the_script_with_its_message(cloud):
    (cloud / "unreachable").write_text("Failed to find attribute [project].\n- provide the argument `--project`")
    code, output = ended(start(cloud, local_job(cloud)))
    assert code == 2
    assert "can't look up mine: ERROR: (gcloud.compute.tpus) Failed to find attribute [project]. - provide" in output
    assert not calls(cloud, "create") and not calls(cloud, "delete")


def test_machines_of_another_job_with_this_name_are_left_alone(cloud):
    (cloud / "state").write_text("ACTIVE")
    code, output = ended(start(cloud, local_job(cloud)))
    assert code == 2 and "mine exists; use " in output
    assert (cloud / "state").exists()


def test_a_refused_request_is_one_line_and_leaves_nothing(cloud):
    (cloud / "create").write_text("RESOURCE_EXHAUSTED: Quota limit 'TPUV6E' has been exceeded. Limit: 0 in us-east5-b.")
    job = local_job(cloud)
    with pytest.raises(ConfigError) as error:
        tpu_vm.submit(job, render(job))
    assert str(error.value) == (
        "mine was refused: ERROR: (gcloud.compute.tpus) RESOURCE_EXHAUSTED: Quota limit 'TPUV6E' has been exceeded. "
        "Limit: 0 in us-east5-b.; ask for quota of this kind in this zone, or use another --zone, a smaller "
        "--accelerator or --spot"
    )
    assert not (cloud / "state").exists() and tpu_vm.supervisor("mine") is None


def test_a_request_that_fails_later_prints_its_reason_and_is_deleted(cloud):
    (cloud / "states").write_text("FAILED\n")
    code, output = ended(start(cloud, local_job(cloud)))
    assert code == 2 and "mine failed: There is no more capacity" in output
    assert not (cloud / "state").exists()


def test_machines_that_can_never_be_reached_end_the_job_and_are_deleted(cloud):
    (cloud / "firewall").touch()
    code, output = ended(start(cloud, local_job(cloud)))
    assert code == 2 and "there is no connection to mine: ERROR: (gcloud.compute.tpus) Connection timed out" in output
    assert len(calls(cloud, "create")) == 1 and not (cloud / "state").exists()


def test_a_missing_wheel_is_refused_before_the_request(cloud):
    job = local_job(cloud, install="none/t5like-0.1.0-py3-none-any.whl")
    with pytest.raises(ConfigError, match="--install='none/t5like-0.1.0-py3-none-any.whl' is no file"):
        tpu_vm.submit(job, render(job))
    assert not (cloud / "calls").exists()


def test_a_missing_gcloud_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="gcloud is needed for TPU VMs and is not on PATH"):
        tpu_vm.submit(JOB, tpu_vm.render(JOB))
