"""A real SLURM cluster on this machine: a controller and compute hosts, which can lose power or network.

Each host has its own network, host name, processes, mounts and /dev/shm. All share the machine's file systems, as hosts
of a cluster share theirs, and keep them when their network is cut. The network is a bridge in the controller's
namespace: the machine's own is not touched. There is no munge, no cgroups and no systemd. It takes root, Linux
namespaces, and Debian's slurmctld, slurmd, slurm-client and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil

HOST = Path(__file__).with_name("host.sh")
PROGRAMS = "slurmctld", "slurmd", "sbatch", "ip", "unshare", "nsenter"
CONTROLLER = "ctl"
GPUS, CPUS, MEBIBYTES = 8, 64, 512_000  # of each host, as it pretends
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"}
CONFIGURATION = """\
ClusterName={name}
SlurmctldHost={controller}({network}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=6
SlurmctldTimeout=6
MessageTimeout=4
TCPTimeout=2
BatchStartTimeout=10
KillWait=5
UnkillableStepTimeout=20
CompleteWait=0
DefMemPerCPU=1000
MinJobAge=3600
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=1
GresTypes=gpu
NodeName=n[1-{nodes}] CPUs={cpus} SocketsPerBoard=2 CoresPerSocket={half} RealMemory={memory} Gres=gpu:{gpus}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why no cluster can be brought up here; "" where one can."""
    if os.geteuid() != 0:
        return "a SLURM cluster of namespaces takes root"
    absent = [program for program in PROGRAMS if not shutil.which(program)]
    return f"a SLURM cluster takes {', '.join(absent)}: bash tests/slurm/install.sh" if absent else ""


class Cluster:
    """Up in a ``with`` block, which leaves no process behind. The compute hosts are n1, n2, ..."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.nodes = [f"n{number + 1}" for number in range(nodes)]
        self._name = f"diffussm{os.getpid()}"
        self._network = "10.77.0"
        self._hosts: dict[str, subprocess.Popen[bytes]] = {}
        self._cut: set[str] = set()

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            self._connect()
            for host in (CONTROLLER, *self.nodes):
                self.power_on(host)
            self.wait_idle()
        except BaseException:
            self._take_down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._take_down()

    def on(self, host: str, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
        """What a command prints on a host; CalledProcessError if it fails, TimeoutExpired after a minute."""
        return subprocess.run(
            [*self._enter(host, cwd), *command], env=env, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    def try_on(
        self, host: str, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A command on a host, which may fail."""
        return subprocess.run([*self._enter(host, cwd), *command], env=env, capture_output=True, text=True, timeout=60)

    def submit(
        self, script: Path, *options: str, arguments: Sequence[str] = (), cwd: Path, env: Mapping[str, str]
    ) -> str:
        """sbatch, with options before the script and arguments after it; the job's number."""
        return self.on(CONTROLLER, "sbatch", "--parsable", *options, str(script), *arguments, cwd=cwd, env=env).strip()

    def job(self, job: str) -> dict[str, str]:
        """What scontrol says of a job."""
        shown = self.on(CONTROLLER, "scontrol", "show", "--oneliner", "job", job)
        return dict(item.partition("=")[::2] for item in shown.split())

    def jobs_of(self, array: str) -> list[str]:
        """The numbers of an array's jobs."""
        shown = self.on(CONTROLLER, "squeue", "--noheader", "--states=all", "--array", "--format=%A", f"--jobs={array}")
        return shown.split()

    def wait_ended(self, job: str, seconds: float) -> dict[str, str]:
        """The job's last state, once it is COMPLETED or FAILED or the like."""
        deadline = time.monotonic() + seconds
        while (now := self.job(job))["JobState"] not in ENDED:
            assert time.monotonic() < deadline, f"job {job} is {now['JobState']} after {seconds:g} s"
            time.sleep(0.2)
        return now

    def wait_idle(self, seconds: float = 60) -> None:
        """Return once every node is free."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(subprocess.CalledProcessError):
                states = self.on(CONTROLLER, "sinfo", "--noheader", "--Node", "--format", "%T").split()
                if states == ["idle"] * len(self.nodes):
                    return
            assert time.monotonic() < deadline, f"not all hosts are free: {states}; see {self.folder}/log"
            time.sleep(0.1)

    def power_on(self, host: str) -> None:
        daemon = ["slurmctld", "-D"] if host == CONTROLLER else ["slurmd", "-D", "-N", host]
        # the system kills them when this process is killed: no cluster outlives its tests
        own = ["setpriv", "--pdeathsig=KILL", "unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc"]
        own += ["--kill-child", "bash", str(HOST), host, str(self.folder)]
        with (self.folder / "log" / f"{host}.out").open("ab") as log:
            self._hosts[host] = subprocess.Popen(
                ["ip", "netns", "exec", f"{self._name}-{host}", *own, *daemon],
                env={name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while not psutil.Process(self._hosts[host].pid).children():
            time.sleep(0.01)

    def power_off(self, host: str) -> None:
        """All its processes are gone at once, and say nothing to anybody."""
        process = self._hosts.pop(host)
        for child in psutil.Process(process.pid).children():
            child.kill()
        process.kill()
        process.wait()

    def cut(self, host: str) -> None:
        """Pull the plug of its network."""
        self._cut.add(host)
        self._link(host, "down")

    def mend_all(self) -> None:
        """Cancel all jobs, and have all hosts up and free again."""
        self.on(CONTROLLER, "scancel", "--user=root")
        for host in self._cut:
            self._link(host, "up")
            self.power_off(host)
        self._cut.clear()
        for host in self.nodes:
            if host not in self._hosts:
                self.power_on(host)
        self.wait_idle()

    def _link(self, host: str, state: str) -> None:
        _run("ip", "-n", f"{self._name}-{host}", "link", "set", "eth0", state)

    def processes(self, host: str) -> list[psutil.Process]:
        """All that run on a host, daemons included."""
        return psutil.Process(self._hosts[host].pid).children(recursive=True)

    def _enter(self, host: str, cwd: Path | None) -> list[str]:
        (init,) = psutil.Process(self._hosts[host].pid).children()
        return ["nsenter", f"--target={init.pid}", "--mount", "--uts", "--net", "--pid", f"--wd={cwd or '/'}"]

    def _configure(self) -> None:
        for name in ("etc", "state", "log", "spool", "devices"):
            (self.folder / name).mkdir()
        addresses = {CONTROLLER: self._address(CONTROLLER)} | {host: self._address(host) for host in self.nodes}
        hosts = ["127.0.0.1 localhost", *(f"{address} {host}" for host, address in addresses.items())]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        for number in range(GPUS):  # SLURM counts them only as device files; these are the null device
            os.mknod(self.folder / f"devices/nvidia{number}", 0o666 | 0o020000, os.makedev(1, 3))
        etc = self.folder / "etc"
        text = CONFIGURATION.format(
            name=self._name, controller=CONTROLLER, network=self._network, folder=self.folder, nodes=len(self.nodes),
            cpus=CPUS, half=CPUS // 2, memory=MEBIBYTES, gpus=GPUS,
        )  # fmt: skip
        (etc / "slurm.conf").write_text(text)
        files = f"{self.folder}/devices/nvidia[0-{GPUS - 1}]"
        (etc / "gres.conf").write_text(f"AutoDetect=off\nNodeName=n[1-{len(self.nodes)}] Name=gpu File={files}\n")
        (etc / "cgroup.conf").write_text("CgroupAutomount=no\nCgroupPlugin=cgroup/v1\n")
        (etc / "plugstack.conf").write_text("")
        (etc / "mpi.conf").write_text("PMIxCliTmpDirBase=/dev/shm\n")  # /tmp is shared here, where it would clash

    def _connect(self) -> None:
        inside = ("ip", "-n", f"{self._name}-{CONTROLLER}")
        for host in (CONTROLLER, *self.nodes):
            _run("ip", "netns", "add", f"{self._name}-{host}")
        _run(*inside, "link", "add", "bridge", "type", "bridge")
        _run(*inside, "addr", "add", f"{self._address(CONTROLLER)}/24", "dev", "bridge")
        _run(*inside, "link", "set", "bridge", "up")
        for host in self.nodes:
            name = f"{self._name}-{host}"
            _run("ip", "-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", host, "netns", inside[2])
            _run(*inside, "link", "set", host, "master", "bridge", "up")
            _run("ip", "-n", name, "addr", "add", f"{self._address(host)}/24", "dev", "eth0")
            _run("ip", "-n", name, "link", "set", "eth0", "up")

    def _address(self, host: str) -> str:
        return f"{self._network}.{1 if host == CONTROLLER else 10 + int(host[1:])}"

    def _take_down(self) -> None:
        for host in list(self._hosts):
            self.power_off(host)
        for host in (CONTROLLER, *self.nodes):
            subprocess.run(["ip", "netns", "delete", f"{self._name}-{host}"], capture_output=True)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
