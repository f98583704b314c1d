"""Jobs for Kubernetes whose manifests are golden files; `python tests/kubernetes_jobs.py` writes those files again."""

from pathlib import Path

from launch import kubernetes
from launch.job import JobSpec, Mount, Secret, SweepRun

GOLDEN = Path(__file__).parent / "golden/launch/kubernetes"
IMAGE = "registry.example/t5like:0.1.0"
TRAIN = ("train", "--config=t5_large", "--workdir=/runs/large")
SHARED = (Mount("pvc:runs", "/runs"),)

CPU = JobSpec(
    name="tiny",
    command=("train", "--config=tiny", "--workdir=/runs/tiny"),
    workdir="/runs/tiny",
    cpus_per_process=4,
    memory_gib=8,
    image=IMAGE,
    mounts=SHARED,
    compile_cache="/runs/jax_cache",
)
JOBS = {
    "cpu": CPU,
    "two_slices_of_v5e-256": JobSpec(
        name="large",
        command=TRAIN,
        workdir="/runs/large",
        accelerator="v5e:16x16",
        slices=2,
        nodes=64,
        image=IMAGE,
        queue="team-a",
        service_account="trainer",
        priority="high",
        spot=True,
        grace=25,
        retries=100,
        mounts=SHARED,
        secrets=(Secret("WANDB_API_KEY", "wandb/api-key"),),
    ),
    "v5p-512": JobSpec(
        name="large",
        command=TRAIN,
        workdir="/runs/large",
        accelerator="v5p:4x8x8",
        nodes=64,
        image=f"registry.example/t5like@sha256:{'0123456789abcdef' * 4}",
        namespace="research",
        mounts=(Mount("gs://lab-runs", "/runs"), Mount("gs://lab-data/stores", "/data", read_only=True)),
        time_limit=24 * 3600,
    ),
    "8_nodes_of_h100": JobSpec(
        name="large",
        command=TRAIN,
        workdir="/runs/large",
        accelerator="h100:8x8",
        nodes=8,
        cpus_per_process=96,
        memory_gib=1024,
        image=IMAGE,
        mounts=SHARED,
        node_selector=(("nvidia.com/gpu.product", "NVIDIA-H100-80GB-HBM3"),),
        env=(("NCCL_DEBUG", "WARN"),),
        setup=("export NCCL_SOCKET_IFNAME=eth0",),
    ),
    "sweep": JobSpec(
        name="rates",
        command=("train", "--config=tiny", "--workdir=/runs/rates"),
        workdir="/runs/rates",
        nodes=2,
        image=IMAGE,
        mounts=SHARED,
        queue="team-a",
        runs=(
            SweepRun("rate_0.01", ("--config.optimizer.learning_rate=0.01",)),
            SweepRun("rate_0.003", ("--config.optimizer.learning_rate=0.003",)),
        ),
    ),
}


def main() -> None:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, job in JOBS.items():
        kubernetes.check(job)
        (GOLDEN / f"{name}.yaml").write_text(kubernetes.render(job), encoding="utf-8")


if __name__ == "__main__":
    main()
