"""A SLURM cluster on this machine for tests: real daemons on nodes that are namespaces. Starts in two seconds.

Each node has its own network address, process list and host name, so it behaves like a machine: it has its own ports
and can die as a whole. Nothing is reachable from outside. Needs root, ``ip``, and Debian's ``slurm-wlm`` and ``munge``.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

CONTROLLER = "ctl"
PROGRAMS = ("ip", "unshare", "setpriv", "munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
_TIMEOUT = 60.0

_CONFIG = """\
ClusterName=lab
SlurmctldHost=ctl(10.77.0.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job starts again after the credential has expired, by default two minutes.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
# No cgroups. SLURM then signals every process of a step.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
# Nodes may have more CPUs and memory than the machine.
SlurmdParameters=config_overrides
GresTypes=gpu
# A lost node is noticed after 5 to 15 s.
SlurmdTimeout=5
KillWait=10
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-{nodes}] NodeAddr=10.77.0.[1-{nodes}] CPUs=16 RealMemory=4000 Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=0
PartitionName=grace Nodes=ALL MaxTime=INFINITE PriorityTier=2 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why no cluster can run here; empty if one can."""
    if os.geteuid():
        return "a SLURM of its own needs root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm munge iproute2"
    network = (
        "ip netns add probe && ip netns del probe && ip link add b0 type bridge && ip link add v0 type veth peer v1"
    )
    words = ["unshare", "--net", "--pid", "--mount", "--fork", "sh", "-c", network]
    probe = subprocess.run(words, capture_output=True, text=True)
    return f"no namespaces or bridges: {probe.stderr.strip()}" if probe.returncode else ""


def wait_for(what: str, happened: Callable[[], object], seconds: float = _TIMEOUT) -> None:
    """Wait until ``happened()`` is true.

    Raises:
        AssertionError: it is not after ``seconds``.
    """
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)


class Lab:
    """A running cluster of nodes n1, n2, ... and a controller, where ``sbatch`` is called."""

    def __init__(self, nodes: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm"))  # short: it holds a socket
        self._names = [CONTROLLER, *(f"n{i}" for i in range(1, nodes + 1))]
        self._prefix = f"lab{os.getpid()}"
        self._hosts: dict[str, subprocess.Popen[bytes]] = {}
        self._munge: subprocess.Popen[bytes] | None = None
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        """Make the network and start every daemon."""
        nodes, munge = len(self._names) - 1, self.folder / "munge"
        self._add_network()
        self._write_config(nodes)
        self._munge = self._spawn(
            *["setpriv", "--reuid", "munge", "--regid", "munge", "--clear-groups", "--pdeathsig", "KILL"],
            *[
                "munged",
                "--foreground",
                "--num-threads=2",
                f"--key-file={munge}/key",
                f"--socket={munge}/socket",
                f"--pid-file={munge}/pid",
            ],
            *[f"--log-file={munge}/log", f"--seed-file={munge}/seed"],
        )
        wait_for("munged listens", (munge / "socket").exists)
        for name in self._names:
            self.boot(name)
        wait_for("all nodes are idle", lambda: self.on("sinfo", "-hNpmain", "-o%T").split() == ["idle"] * nodes)

    def _add_network(self) -> None:
        def ip(*words: str) -> None:
            subprocess.run(["ip", *words], check=True)

        for i, name in enumerate(self._names):
            space = self._space(name)
            ip("netns", "add", space)
            ip("-n", space, "link", "set", "lo", "up")
            if name == CONTROLLER:
                ip("-n", space, "link", "add", "br0", "type", "bridge")
                ip("-n", space, "addr", "add", "10.77.0.254/24", "dev", "br0")
                ip("-n", space, "link", "set", "br0", "up")
            else:
                switch = self._space(CONTROLLER)
                ip("-n", switch, "link", "add", f"v{i}", "type", "veth", "peer", "name", "eth0", "netns", space)
                ip("-n", switch, "link", "set", f"v{i}", "master", "br0", "up")
                ip("-n", space, "addr", "add", f"10.77.0.{i}/24", "dev", "eth0")
                ip("-n", space, "link", "set", "eth0", "up")
            # ``ip netns exec`` mounts these over the files in /etc.
            etc = Path("/etc/netns", space)
            etc.mkdir(parents=True)
            nodes = [f"10.77.0.{j} {node}" for j, node in enumerate(self._names) if j]
            (etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", "10.77.0.254 ctl", *nodes, ""]))
            (etc / "nsswitch.conf").write_text("hosts: files\n")  # otherwise each start waits 10 s for a name server

    def _write_config(self, nodes: int) -> None:
        (self.folder / "slurm.conf").write_text(_CONFIG.format(folder=self.folder, nodes=nodes))
        for i in range(8):  # SLURM counts GPUs that are files
            (self.folder / f"gpu{i}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        # slurmd looks for cgroups in /sys, which is empty on a node.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for name in ("state", "munge", *(f"spool-{name}" for name in self._names)):
            (self.folder / name).mkdir()
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.folder.chmod(0o755)
        for path in (key.parent, key):
            shutil.chown(path, "munge", "munge")

    def _space(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _spawn(self, *command: str) -> subprocess.Popen[bytes]:
        with open(self.folder / "daemons.log", "ab") as output:
            return subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def boot(self, name: str) -> None:
        """Start a node, or the controller, with its daemon."""
        daemon = "slurmctld" if name == CONTROLLER else "slurmd"
        dies_with_the_tests = ("setpriv", "--pdeathsig", "KILL")
        in_space = ("ip", "netns", "exec", self._space(name))
        own = ("unshare", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child")
        first = ("bash", "-c", f"hostname {name}; {daemon} -D & wait")
        self._hosts[name] = self._spawn(*dies_with_the_tests, *in_space, *own, *first)

    def kill(self, name: str) -> None:
        """A node loses power: all its processes end at once."""
        unshare = self._hosts[name]
        first = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text().split()
        for pid in first:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), 9)
        unshare.wait()

    def enter(self, name: str) -> Sequence[str]:
        """The words before a command that runs it on a node as one of its processes."""
        unshare = self._hosts[name].pid
        first = Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()[0]
        return ["nsenter", "--target", first, "--all"]

    def on(self, *command: str, check: bool = True, cwd: Path | None = None, **environment: str) -> str:
        """Run a command on the controller's machine, as a user would on a log-in node; returns its output."""
        done = subprocess.run(
            ["ip", "netns", "exec", self._space(CONTROLLER), *command],
            env={**self.environment, **environment},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
        )
        assert not check or not done.returncode, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """What SLURM says of a job, such as its ``JobState``; empty if it does not know the job."""
        found = re.search(rf"(?<!\S){name}=(\S*)", self.on("scontrol", "-o", "show", "job", job, check=False))
        return found[1] if found else ""

    def wait_for_state(self, job: str, *states: str, seconds: float = _TIMEOUT) -> str:
        """Wait until a job has one of ``states``, and return it."""
        wait_for(f"job {job} {states}", lambda: self.field(job, "JobState") in states, seconds)
        return self.field(job, "JobState")

    def close(self) -> None:
        """End all processes and remove all namespaces and files."""
        for name in self._hosts:
            with contextlib.suppress(OSError):  # it is down already
                self.kill(name)
        if self._munge is not None:
            self._munge.kill()
            self._munge.wait()
        for name in self._names:
            subprocess.run(["ip", "netns", "del", self._space(name)], check=False, capture_output=True)
            shutil.rmtree(Path("/etc/netns", self._space(name)), ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def cluster(nodes: int) -> Iterator[Lab]:
    """A cluster for the time of a ``with`` block."""
    lab = Lab(nodes)
    try:
        lab.start()
        yield lab
    finally:
        lab.close()
