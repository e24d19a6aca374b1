"""A small real Slurm on this machine: a controller and nodes as processes on 127.0.0.1, without systemd, cgroups or a database."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

BINARIES = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "munged")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def missing() -> list[str]:
    return [name for name in BINARIES if not shutil.which(name, path=PATH)]


class Cluster:
    """`nodes` nodes called node1, node2 …; a context manager. Nothing outside `folder` is written."""

    def __init__(self, folder: Path, nodes: int = 2):
        self.folder, self.names = folder, [f"node{i}" for i in range(1, nodes + 1)]
        self.env = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Cluster":
        for name in ("state", "munge", *self.names):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        (self.folder / "munge").chmod(0o755)
        ports = free_ports(2 + len(self.names))
        user = subprocess.run(["id", "-un"], capture_output=True, text=True).stdout.strip()
        settings = f"""
            ClusterName=test
            SlurmctldHost={socket.gethostname()}(127.0.0.1)
            SlurmUser={user}
            SlurmdUser={user}
            SlurmctldPort={ports[0]}
            SlurmdPort={ports[1]}
            CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
            AuthType=auth/munge
            AuthInfo=socket={self.folder}/munge/socket,cred_expire=5
            CredType=cred/munge
            StateSaveLocation={self.folder}/state
            SlurmdSpoolDir={self.folder}/%n
            SlurmctldPidFile={self.folder}/slurmctld.pid
            SlurmdPidFile={self.folder}/%n/slurmd.pid
            SlurmctldLogFile={self.folder}/slurmctld.log
            SlurmdLogFile={self.folder}/%n.log
            PlugStackConfig={self.folder}/plugstack.conf
            MailProg=/bin/true
            ProctrackType=proctrack/linuxproc
            TaskPlugin=task/none
            JobAcctGatherType=jobacct_gather/none
            AccountingStorageType=accounting_storage/none
            MpiDefault=none
            SelectType=select/cons_tres
            SelectTypeParameters=CR_Core
            SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=1
            JobRequeue=1
            ReturnToService=2
            SlurmdTimeout=30
            KillWait=5
            SlurmdParameters=config_overrides
            """
        rows = [line.strip() for line in settings.strip().splitlines()]
        rows += [
            f"NodeName={n} NodeHostname={n} NodeAddr=127.0.0.1 Port={p} CPUs=16 RealMemory=1000000"
            for n, p in zip(self.names, ports[2:])
        ]
        (self.folder / "slurm.conf").write_text(
            "\n".join(
                [*rows, "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP", ""]
            )
        )
        (self.folder / "plugstack.conf").write_text("")
        key = self.folder / "munge/key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self._start("munged", "--foreground", "--force", f"--key-file={key}", *(f"--{n}={self.folder}/munge/{n[:4]}" for n in ("pid-file", "log-file", "seed-file")), f"--socket={self.folder}/munge/socket")  # fmt: skip
        wait_for((self.folder / "munge/socket").exists, "munged")
        self._start("slurmctld", "-D", "-c")
        for name in self.names:
            self.start_node(name)
        self.wait_until_idle()
        return self

    def __exit__(self, *_) -> None:
        self.ask("scancel", "--user", str(os.getuid()), check=False)
        for name in self.names:
            self.kill_node(name)
        for daemon in self.daemons.values():
            daemon.terminate()
        for daemon in self.daemons.values():
            daemon.wait(timeout=30)

    def _start(self, program: str, *arguments: str, name: str = "") -> None:
        with open(self.folder / "daemons.log", "a") as log:
            self.daemons[name or program] = subprocess.Popen(
                [shutil.which(program, path=PATH), *arguments], env=self.env, stdout=log, stderr=log
            )

    def start_node(self, name: str) -> None:
        self._start("slurmd", "-D", "-N", name, name=name)

    def kill_node(self, name: str) -> None:
        """The daemon and all it has started die at once, as when the power goes."""
        if daemon := self.daemons.pop(name, None):
            daemon.kill()
            daemon.wait()
            own = [
                p
                for p, env in processes().items()
                if env.get("SLURMD_NODENAME") == name
                and env.get("SLURM_CONF") == self.env["SLURM_CONF"]
            ]
            parents = {parent_of(p) for p in own}
            for process in [
                *(p for p in parents if command(p).startswith("slurmstepd")),
                *own,
            ]:  # the former first: they would report the end
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

    def ask(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout

    def wait_until_idle(self) -> None:
        wait_for(
            lambda: self.ask("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split() == self.names,
            "idle nodes",
        )

    def job(self, number: str) -> dict[str, str]:
        words = self.ask("scontrol", "-o", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_job(self, number: str, seconds: float = 900) -> dict[str, str]:
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_for(lambda: self.job(number)["JobState"] in ended, f"job {number}", seconds)
        return self.job(number)


def wait_for(condition, what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return
        except AssertionError:  # a daemon that does not answer yet
            pass
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds} s for {what}")


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def processes() -> dict[int, dict[str, str]]:
    """All that can be looked into, with their environments."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            rows = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            found[int(folder.name)] = dict(row.split("=", 1) for row in rows if "=" in row)
    return found


def parent_of(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def command(process: int) -> str:
    try:
        return Path(f"/proc/{process}/comm").read_text()
    except OSError:
        return ""
