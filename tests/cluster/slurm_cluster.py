"""A Slurm cluster of four nodes on this machine: munged, slurmctld and four slurmd, started and ended by `Cluster`.

    python tests/cluster/slurm_cluster.py [COMMAND...]     run a command, or a shell, that submits to a new cluster

Each node claims 16 CPUs and two GPUs; what runs there uses fake devices. The names of the nodes are addresses of this
host, because processes find each other by the names that Slurm gives them.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
PACKAGES = "slurm-wlm munge"  # of Debian and Ubuntu
NODES = ("127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4")
HOST = socket.gethostname().partition(".")[0]
START_SECONDS = 60

# cred_expire: a job that is queued again waits so long; KillWait: from SIGTERM to SIGKILL at the end of a job.
# The other times are long because the machine may be slow.
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
KillWait=20
BatchStartTimeout=120
MessageTimeout=60
SlurmdTimeout=0
UnkillableStepTimeout=600
MinJobAge=3600
GresTypes=gpu,slot
SlurmdParameters=config_overrides
NodeName=DEFAULT CPUs=16 RealMemory=16000 Gres=gpu:2,slot:1
NodeName={nodes[0]} NodeHostname={host} NodeAddr={nodes[0]} Port={ports[1]}
NodeName={nodes[1]} NodeHostname={host} NodeAddr={nodes[1]} Port={ports[2]}
NodeName={nodes[2]} NodeHostname={host} NodeAddr={nodes[2]} Port={ports[3]}
NodeName={nodes[3]} NodeHostname={host} NodeAddr={nodes[3]} Port={ports[4]}
PartitionName=main Nodes={nodes[0]},{nodes[1]} Default=YES PriorityTier=1 PreemptMode=OFF
PartitionName=spot Nodes={nodes[0]},{nodes[1]} PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent Nodes={nodes[0]},{nodes[1]} PriorityTier=9 PreemptMode=OFF
PartitionName=single Nodes={nodes[2]}
PartitionName=lost Nodes={nodes[3]}
"""


class Cluster:
    """A running cluster; `environment` is what its client programs need."""

    def __init__(self) -> None:
        os.environ["PATH"] += ":/usr/sbin:/sbin"
        if missing := [program for program in PROGRAMS if not shutil.which(program)]:
            raise RuntimeError(f"{', '.join(missing)} must be installed: apt-get install {PACKAGES}, or `make cluster`")
        if NODES[0] == NODES[1]:
            raise RuntimeError("the name of this host must not be localhost: two nodes need two names")
        self.root = Path(tempfile.mkdtemp(prefix="slurm-"))  # the path of a socket must be short
        self.environment = {"SLURM_CONF": str(self.root / "slurm.conf")}
        (self.root / "state").mkdir()
        (self.root / "munge.key").write_bytes(os.urandom(1024))
        (self.root / "munge.key").chmod(0o400)
        (self.root / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\nName=slot Count=1\n")
        user = subprocess.check_output(["id", "-un"], text=True).strip()
        values = {"root": self.root, "host": HOST, "nodes": NODES, "ports": free_ports(5), "user": user}
        (self.root / "slurm.conf").write_text(CONF.format(**values))
        os.environ |= self.environment
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        files = {"--key-file": "munge.key", "--socket": "munge.socket", "--pid-file": "munge.pid"}
        files |= {"--log-file": "munge.log", "--seed-file": "munge.seed"}
        flags = [f"{flag}={self.root / name}" for flag, name in files.items()]
        subprocess.run(["munged", "--force", *flags], check=True)
        subprocess.run(["slurmctld"], check=True)
        for node in NODES:
            (self.root / f"spool.{node}").mkdir()
            start_node(node)
        deadline = time.monotonic() + START_SECONDS
        while len(idle := self.idle_nodes()) < len(NODES):
            if time.monotonic() > deadline:
                raise RuntimeError(f"only {idle} of {NODES} became idle; see {self.root}/*.log")
            time.sleep(0.2)

    def idle_nodes(self) -> list[str]:
        """Names of the nodes on which nothing runs."""
        command = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()

    def stop(self) -> None:
        """End all jobs and daemons."""
        pids = [
            path.read_text().strip()
            for path in (*self.root.glob("slurm*.pid"), self.root / "munge.pid")
            if path.exists()
        ]
        subprocess.run(
            ["scancel", "--state=PENDING", "--state=RUNNING", "--signal=KILL", "--full", f"--user={os.getuid()}"],
            capture_output=True,
            check=False,
        )
        for pid in map(int, filter(None, pids)):
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                continue
        shutil.rmtree(self.root, ignore_errors=True)


def start_node(node: str) -> None:
    """Start the daemon of a node of the cluster that `SLURM_CONF` names, as after a boot: it knows no earlier job."""
    subprocess.run(["slurmd", "-c", "-N", node], check=True)


def free_ports(count: int) -> list[int]:
    """Ports that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cluster = Cluster()
    try:
        sys.exit(subprocess.run(sys.argv[1:] or ["bash"], check=False).returncode)
    finally:
        cluster.stop()
