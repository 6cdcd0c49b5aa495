"""A real SLURM on one machine: slurmctld, munge, and two slurmds that are two nodes with two declared GPUs each.

All files are in one directory, and all ports are free ones, so it does not interfere with other services. Each slurmd
has its own host name and /etc/hosts (a mount and a UTS namespace), so that node names resolve as on a cluster. There
are three partitions: ``batch``; ``spare``, whose jobs are pre-empted with a grace time; ``urgent``, whose jobs pre-empt
them.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")  # of Debian and Ubuntu
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "unshare", "mknod")
NODES = ("node1", "node2")


def why_impossible() -> str | None:
    """Install SLURM if it is missing; return the reason if it cannot be installed."""
    if os.geteuid() != 0:
        return "two SLURM nodes on one machine need root, for their host names"
    if not _missing():
        return None
    if shutil.which("apt-get") is None:
        return f"{', '.join(_missing())} not installed, and there is no apt-get to install them"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES]):
        try:
            done = subprocess.run(["apt-get", *command], env=environment, capture_output=True, text=True, timeout=240)
        except subprocess.TimeoutExpired:
            return f"apt-get {command[0]} has taken more than 240 seconds"
        if done.returncode != 0:
            return f"apt-get {command[0]} failed: {' '.join(done.stderr.split())[-300:]}"
    return f"{', '.join(_missing())} missing after apt-get install {' '.join(PACKAGES)}" if _missing() else None


def _missing() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name) is None]


class Lab:
    """SLURM, from :meth:`start` to :meth:`stop`.

    Args:
        folder: for its configuration, state and logs; readable by all, as munge asks for it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": f"{folder}/etc/slurm.conf"}

    def start(self) -> None:
        """Raises RuntimeError, with the end of the daemons' logs, where the nodes are not ready in time."""
        self._write_configuration()
        run = self.folder / "run"
        (run / "munge.key").write_bytes(secrets.token_bytes(1024))
        (run / "munge.key").chmod(0o400)
        munge = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid", "seed-file": "munged.seed"}
        options = [f"--{name}={run / file}" for name, file in munge.items()]
        self.call("munged", *options, f"--log-file={self.folder}/log/munged.log")
        self.call("slurmctld", "-c")
        for node in NODES:
            in_namespace = 'hostname "$1"; mount --bind "$2" /etc/hosts; exec slurmd -N "$1"'
            hosts = f"{self.folder}/etc/hosts"
            self.call("unshare", "--mount", "--uts", "bash", "-c", in_namespace, "slurmd", node, hosts)
        deadline = time.monotonic() + 60
        while self.call("sinfo", "-h", "-N", "-p", "batch", "-t", "idle", "-o", "%N", check=False).split() != [*NODES]:
            if time.monotonic() > deadline:
                logs = [path.read_text()[-1500:] for path in sorted((self.folder / "log").glob("*.log"))]
                raise RuntimeError("the nodes are not ready after 60 seconds:\n" + "\n".join(logs))
            time.sleep(0.1)

    def stop(self) -> None:
        subprocess.run(["scancel", "--user=root"], env=self.environment, timeout=60, capture_output=True, check=False)
        deadline = time.monotonic() + 20
        while self.call("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.2)
        for name in (*(f"slurmd.{node}" for node in NODES), "slurmctld", "munged"):
            _end(self.folder / "run" / f"{name}.pid")

    def call(self, *command: str, check: bool = True) -> str:
        """What a command prints. Into a file first: a daemon would keep a pipe open."""
        with (self.folder / "call.out").open("w+") as out:
            done = subprocess.run(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=60, check=False
            )
            out.seek(0)
            said = out.read()
        if check and done.returncode != 0:
            raise RuntimeError(f"{command}: exit code {done.returncode}: {said}")
        return said

    def _write_configuration(self) -> None:
        for name in ("etc", "state", "spool/node1", "spool/node2", "log", "run"):
            (self.folder / name).mkdir(parents=True)
        for folder in (self.folder, self.folder / "run"):
            folder.chmod(0o755)
        controller, *of_nodes = free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=4000 Gres=gpu:2"
            for node, port in zip(NODES, of_nodes, strict=True)
        )
        (self.folder / "etc/slurm.conf").write_text(
            _SLURM_CONF.format(folder=self.folder, port=controller, nodes=nodes)
        )
        (self.folder / "etc/cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.folder / "etc/gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-1]\n")
        (self.folder / "etc/hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()}\n127.0.0.1 node1 node2\n")
        for number in range(2):  # a declared GPU is a character device
            self.call("mknod", "-m", "666", f"{self.folder}/gpu{number}", "c", "1", "3")


# cred_expire: a requeued job starts after seconds instead of two minutes. No preempt_send_user_signal: at pre-emption
# the tasks hear SIGTERM themselves, while before the time limit the batch script hears SIGUSR1: both ways are tested.
_SLURM_CONF = """\
ClusterName=lab
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmctldTimeout=10
SlurmdTimeout=60
MessageTimeout=30
InactiveLimit=0
Waittime=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=OFF
PartitionName=spare Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def _end(pid_file: Path) -> None:
    if not pid_file.is_file():
        return
    pid = int(pid_file.read_text())
    for number, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + seconds
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
