"""Launchers' environment variables, as recorded or as in their manuals, and the detected processes."""

import http.server
import threading

import pytest

from t5like.distributed.launchers import detect_process, metadata
from t5like.errors import ConfigError

SRUN = {
    "SLURM_JOB_ID": "4242",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NODELIST": "gpu[007,009-012]",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_GPUS_ON_NODE": "8",
}
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "4242",
    "SLURM_NTASKS": "8",
    "SLURM_JOB_NODELIST": "gpu[007,009-012]",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
SSH = {"SLURM_JOB_ID": "4242", "SLURM_NTASKS": "8", "SLURM_NNODES": "4", "SSH_CONNECTION": "10.0.0.1 5022 10.0.0.7 22"}
TPU = {"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "t0.svc,t1.svc,t2.svc,t3.svc"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
HYDRA = {"PMI_SIZE": "4", "PMI_RANK": "1", "MPI_LOCALNRANKS": "4", "MPI_LOCALRANKID": "1"}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "WORLD_SIZE": "16",
    "RANK": "9",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "8",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "t5-2", "JOB_COMPLETION_INDEX": "2"}
EXPLICIT = {"T5LIKE_COORDINATOR": "10.0.0.5:1234", "T5LIKE_NUM_PROCESSES": "3", "T5LIKE_PROCESS_ID": "2"}
JAX = {"JAX_COORDINATOR_ADDRESS": "10.0.0.5:1234", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "0"}


@pytest.mark.parametrize(
    "variables, host, num_processes, process, local_devices",
    [
        (SRUN, "gpu007", 8, 3, (1,)),
        (SRUN | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, "gpu007", 8, 3, (4, 5, 6, 7)),
        (SRUN | {"SLURM_GPUS_PER_TASK": "4"}, "gpu007", 8, 3, None),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "1(x8)", "SLURM_LOCALID": "0"}, "gpu007", 8, 3, None),
        (SRUN | {"SLURM_STEP_NODELIST": "r[2-3]n[01,04]-ib,x9"}, "r2n01-ib", 8, 3, (1,)),
        (SRUN | {"SSH_CONNECTION": "sbatch passes it on"}, "gpu007", 8, 3, (1,)),
        (TPU, "t0.svc", 4, 2, None),
        (
            TPU
            | {
                "MEGASCALE_NUM_SLICES": "2",
                "MEGASCALE_SLICE_ID": "1",
                "MEGASCALE_COORDINATOR_ADDRESS": "first.svc:8080",
            },
            "first.svc",
            8,
            6,
            None,
        ),
        (OPEN_MPI, "10.96.0.1", 4, 3, (1,)),
        (OPEN_MPI | BATCH_SCRIPT, "10.96.0.1", 4, 3, (1,)),  # mpirun inside of Slurm
        (HYDRA, "127.0.0.1", 4, 1, (1,)),
        (TORCHRUN, "node1", 16, 9, (1,)),
        (POD | {"T5LIKE_NUM_PROCESSES": "4", "T5LIKE_SERVICE": "pods"}, "t5-0.pods", 4, 2, None),
        (EXPLICIT, "10.0.0.5", 3, 2, None),
        (JAX, "10.0.0.5", 3, 0, None),
        (SSH | EXPLICIT, "10.0.0.5", 3, 2, None),
        (SRUN | {"T5LIKE_COORDINATOR": "10.0.0.5:1234"}, "10.0.0.5", 8, 3, (1,)),
    ],
)
def test_complete_variables_of_a_launcher_are_detected(variables, host, num_processes, process, local_devices):
    start = detect_process(variables)
    assert start.coordinator.rpartition(":")[0] == host
    assert (start.num_processes, start.process, start.local_devices) == (num_processes, process, local_devices)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        SSH,
        {"SLURM_JOB_ID": "4242", "SSH_CONNECTION": "x"},
        BATCH_SCRIPT | {"SLURM_NTASKS": "1"},
        {"SLURM_JOB_ID": "4242"},
        SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun -n 1 inside a job of 8 tasks
        {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "pod"},
        POD | {"T5LIKE_NUM_PROCESSES": "1"},
        BATCH_SCRIPT | {"T5LIKE_NUM_PROCESSES": "1"},
        {"T5LIKE_NUM_PROCESSES": "1"},
    ],
)
def test_a_process_without_a_launcher_runs_alone(variables):
    assert detect_process(variables) is None


@pytest.mark.parametrize(
    "variables, message",
    [
        (BATCH_SCRIPT, "SLURM_JOB_ID=4242 is set by Slurm, but SLURM_STEP_NODELIST is missing: start it with srun"),
        (
            {"SLURM_JOB_ID": "4242", "SLURM_NTASKS": "8"},
            "SLURM_PROCID and SLURM_STEP_NODELIST are missing: start it with srun, or set T5LIKE_NUM_PROCESSES=1",
        ),
        (POD, "T5LIKE_NUM_PROCESSES and T5LIKE_SERVICE are missing: .* the job's completions"),
        ({"MASTER_ADDR": "node1", "WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR or MASTER_PORT is missing"),
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": ""}, "T5LIKE_COORDINATOR is missing: set it with mpirun -x"),
        (HYDRA | {"MPI_LOCALNRANKS": "2"}, "MPICH or Intel MPI, but T5LIKE_COORDINATOR is missing"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES or TPU_WORKER_ID is missing"),
        ({"T5LIKE_COORDINATOR": "10.0.0.5:1"}, "T5LIKE_NUM_PROCESSES and T5LIKE_PROCESS_ID are missing.* --process_id"),
        (EXPLICIT | {"T5LIKE_PROCESS_ID": "3"}, "process 3 of 3 is impossible: use a number from 0 to 2"),
        (EXPLICIT | {"T5LIKE_COORDINATOR": "10.0.0.5"}, "must be HOST:PORT, such as 10.0.0.1:8476"),
        ({"T5LIKE_NUM_PROCESSES": "4"}, "T5LIKE_PROCESS_ID and T5LIKE_COORDINATOR are missing"),
        (EXPLICIT | {"T5LIKE_COORDINATOR": "10.0.0.5:123456"}, "must be HOST:PORT"),
        (EXPLICIT | {"JAX_LOCAL_DEVICE_IDS": "all"}, "JAX_LOCAL_DEVICE_IDS=all must be GPU indices"),
        (EXPLICIT | {"T5LIKE_NUM_PROCESSES": "two"}, "num_processes='two' must be a whole number, such as 2"),
        (EXPLICIT | {"T5LIKE_NUM_PROCESSES": "0"}, "num_processes=0 must be at least 1"),
    ],
)
def test_incomplete_variables_are_refused_with_the_missing_ones(variables, message):
    with pytest.raises(ConfigError, match=message):
        detect_process(variables)


def test_all_tasks_of_a_job_use_the_same_port_and_other_jobs_another():
    ports = [detect_process(SRUN | {"SLURM_PROCID": str(task)}).coordinator for task in range(8)]
    assert len(set(ports)) == 1
    assert detect_process(SRUN | {"SLURM_STEP_ID": "2"}).coordinator != ports[0]


def test_a_tpu_machine_reads_the_metadata_server():
    attributes = {
        "worker-network-endpoints": "unknown:t:10.0.0.1,unknown:t:10.0.0.2",
        "agent-worker-number": "1",
        "tpu-env": "ZONE: 'x'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n",
    }

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(attributes[self.path.rpartition("/")[2]].encode())

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        start = detect_process(metadata(f"127.0.0.1:{server.server_port}"))
        server.shutdown()
    assert (start.coordinator, start.num_processes, start.process) == ("10.0.0.1:8476", 4, 3)
    with pytest.raises(ConfigError, match="set T5LIKE_NUM_PROCESSES=1 to run alone"):
        metadata(f"127.0.0.1:{server.server_port}")


@pytest.mark.parametrize("name", ["TPU_WORKER_ID", "MEGASCALE_SLICE_ID", "MEGASCALE_NUM_SLICES"])
def test_a_tpu_variable_that_is_no_number_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"{name}='one' must be a whole number"):
        detect_process({**TPU, name: "one"})
