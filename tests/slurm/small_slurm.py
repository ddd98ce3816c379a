"""A SLURM of our own on this machine: munged, slurmctld and two slurmd on the loopback.

    with SmallSlurm(folder) as slurm:
        slurm.run("sbatch", script)

All its files lie in ``folder``, its ports are free ones, and nothing of it outlives the `with`, nor
this process if that is killed. Both nodes report the same 64 cores, whatever the machine has. The
nodes' names are loopback addresses, so that MASTER_ADDR resolves without a line in /etc/hosts.
"""

import os
import secrets
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tests.ports import free_port

PROGRAMS = ("slurmctld", "slurmd", "munged", "setpriv")
NODES = ("127.0.0.1", "127.0.0.2")

CONF = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CryptoType=crypto/munge
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmctldDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=1
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=30
MessageTimeout=30
ReturnToService=2
NodeName={nodes[0]} NodeAddr=127.0.0.1 Port={ports[1]} {node}
NodeName={nodes[1]} NodeAddr=127.0.0.1 Port={ports[2]} {node}
PartitionName=main Nodes={nodes[0]},{nodes[1]} Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeHostname=localhost Sockets=2 CoresPerSocket=32 ThreadsPerCore=1 RealMemory=1000000"


def why_not() -> str | None:
    """Why it cannot be started here; None if it can."""
    missing = [name for name in PROGRAMS if _find(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: slurm-wlm munge)"
    if os.geteuid() != 0:
        return "only root can start a slurmd that starts jobs"
    return None


class SmallSlurm:
    """The running daemons. ``environment`` is what SLURM's commands need to find them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SLURM")},
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        self._waiting_since: dict[str, float] = {}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "SmallSlurm":
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, *command: object) -> str:
        """What a command of SLURM prints."""
        answer = subprocess.run(
            [str(part) for part in command],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )
        if answer.returncode:
            raise RuntimeError(f"{command}: {answer.stderr.strip()}")
        return answer.stdout

    def jobs(self) -> dict[str, str]:
        """Job id -> state, of those that wait or run."""
        lines = self.run("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)

    def wait_until_empty(self, seconds: float) -> None:
        """Wait until no job waits or runs. A job that was requeued does not sit out its delay."""
        deadline = time.monotonic() + seconds
        while jobs := self.jobs():
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {seconds} s: {self.run('squeue', '--long')}")
            for job, state in jobs.items():
                if state == "PENDING":
                    self.start_now(job)
            time.sleep(0.5)

    def start_now(self, job: str) -> None:
        """End the wait of about two minutes of a requeued job, after five seconds of it: sooner,
        its nodes refuse it by the credential that was revoked.
        """
        if "Reason=BeginTime" not in self.run("scontrol", "show", "job", job):
            self._waiting_since.pop(job, None)
        elif time.monotonic() - self._waiting_since.setdefault(job, time.monotonic()) > 5:
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def end_time_limit(self, job: str) -> None:
        """Let the job's time limit come so near that SLURM sends the job script's `--signal`.

        Limits are whole minutes and are looked at twice a minute, so the ranks are held until then
        (SLURM sends SIGCONT with the signal). Returns when the job has left.
        """
        self.hold(job)
        seconds = _seconds(self.run("squeue", "--noheader", f"--job={job}", "--format=%M").strip())
        # Between 40 s and 100 s from now: time enough to save.
        self.run("scontrol", "update", f"JobId={job}", f"TimeLimit={(seconds + 40) // 60 + 1}")
        running = ("RUNNING", "SIGNALING", "STOPPED")
        _wait_for(lambda: self.jobs().get(job) not in running, "the signal", 150)
        self.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")

    def hold(self, job: str) -> None:
        """Stop the job's processes, and wait for it: a signal that a node has not got when its
        slurmd dies reaches the job's next start there.
        """
        self.run("scancel", "--signal=STOP", job)

        def stopped() -> bool:
            ranks = self.ranks().values()
            return bool(ranks) and all(map(_is_stopped, ranks))

        _wait_for(stopped, "the ranks' stop", 60)

    def ranks(self) -> dict[int, int]:
        """Rank -> process id of the Python processes of running jobs."""
        found = {}
        for pid, environment in _processes():
            own = environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]
            if own and "RANK" in environment and _is_of_a_task(pid):
                found[int(environment["RANK"])] = pid
        return found

    def kill_node(self, node: str, daemon_only: bool = False) -> None:
        """kill -9 the node's slurmd and everything it runs, as if the machine had lost power; or
        the daemon alone, while what it runs lives on.
        """
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()
        if daemon_only:
            return
        running = [
            pid
            for pid, environment in _processes()
            if environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]
            and environment.get("SLURMD_NODENAME") == node
        ]
        # First those that would still report what has ended: a machine without power does not.
        for step in {step for pid in running for step in _steps_above(pid)}:
            _kill(step)
        for pid in running:
            _kill(pid)

    def start_node(self, node: str) -> None:
        self._daemon(node, "slurmd", "-D", "-N", node)

    def close(self) -> None:
        """End the daemons and whatever jobs have left."""
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
            daemon.wait()
        self._daemons.clear()
        for _ in range(20):  # what is being started while we look
            left = [
                pid
                for pid, environment in _processes()
                if environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]
            ]
            for pid in left:
                _kill(pid)
            if not left:
                return
            time.sleep(0.1)

    def log(self, name: str) -> str:
        return (self.folder / "log" / f"{name}.log").read_text(errors="replace")

    def _start(self) -> None:
        for name in ("state", "log", "munge", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        munge = self.folder / "munge"
        key = munge / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        files = [f"--{n}-file={munge / n}" for n in ("key", "pid", "log", "seed")]
        # --force: /tmp above it may be written by all.
        self._daemon(
            "munged", "munged", "--foreground", "--force", f"--socket={munge}/socket", *files
        )
        _wait_for(lambda: (munge / "socket").exists(), "munged", 20)
        text = CONF.format(
            folder=self.folder, ports=[free_port() for _ in range(3)], nodes=NODES, node=NODE
        )
        (self.folder / "slurm.conf").write_text(text)
        self._daemon("slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        _wait_for(self._both_idle, "the two nodes", 60)

    def _both_idle(self) -> bool:
        try:
            states = self.run("sinfo", "--noheader", "--Node", "--format=%T").split()
        except RuntimeError:
            return False
        return states == ["idle", "idle"]

    def _daemon(self, key: str, program: str, *arguments: str) -> None:
        path = _find(program)
        assert path is not None
        with open(self.folder / "log" / f"{key}.out", "ab") as output:
            self._daemons[key] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", path, *arguments],
                env=self.environment,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _processes() -> list[tuple[int, dict[str, str]]]:
    """Every process of this machine that can be read, with its environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            text = (entry / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        pairs = (item.split("=", 1) for item in text.split("\0") if "=" in item)
        found.append((int(entry.name), {key: value for key, value in pairs}))
    return found


def _seconds(elapsed: str) -> int:
    """Seconds of squeue's [D-][H:]M:S."""
    total = 0
    for part in elapsed.replace("-", ":").split(":"):
        total = total * 60 + int(part)
    return total


def _is_of_a_task(pid: int) -> bool:
    """Whether the shell that is a task of a job step started the process."""
    return _parent(_parent(pid)) in _steps_above(pid)


def _steps_above(pid: int) -> list[int]:
    """Every slurmstepd among a process and its ancestors."""
    found = []
    while pid > 1:
        with suppress(OSError):
            if "slurmstepd" in Path(f"/proc/{pid}/comm").read_text():
                found.append(pid)
        pid = _parent(pid)
    return found


def _parent(pid: int) -> int:
    return int(_status(pid)[1])


def _is_stopped(pid: int) -> bool:
    return _status(pid)[0] == "T"


def _status(pid: int) -> list[str]:
    """State and parent of a process, and more; X and 0 if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ["X", "0"]


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _wait_for(condition, what: str, seconds: float) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not ready after {seconds:g} s")
        time.sleep(0.1)
