"""Two simulated hosts on one machine: network namespaces connected by a virtual link."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import psutil


ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "pretrain.py"
INTERFACE = "veth0"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29500


def why_not() -> str | None:
    """Why network namespaces cannot be created on this machine; `None` if they can."""
    name = f"mocov3-try-{os.getpid()}"
    try:
        ip("netns", "add", name)
    except FileNotFoundError:
        return "the command ip (iproute2) is not installed"
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not permitted: {error.stderr.strip()}"
    try:
        ip("link", "add", INTERFACE, "netns", name, "type", "veth", "peer", "name", "veth1", "netns", name)
    except subprocess.CalledProcessError as error:
        return f"virtual network links are not permitted: {error.stderr.strip()}"
    finally:
        ip("netns", "delete", name)
    return None


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


class Hosts:
    """
    Context manager of two hosts; processes that still run on them at exit are killed.

    Args:
        rate: Bandwidth of the link in both directions in the notation of `tc`, such as `400mbit`; `None` for no limit.
    """

    def __init__(self, rate: str | None = None):
        self.names = tuple(f"mocov3-{os.getpid()}-{letter}" for letter in "ab")
        self.rate = rate

    def __enter__(self) -> "Hosts":
        for name in self.names:
            ip("netns", "add", name)
        ends = [("name", INTERFACE, "netns", name) for name in self.names]
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for name, address in zip(self.names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                ip("-n", name, "link", "set", interface, "up")
            if self.rate is not None:
                limit = ["root", "tbf", "rate", self.rate, "burst", "256kb", "latency", "100ms"]
                command = ["tc", "-n", name, "qdisc", "add", "dev", INTERFACE, *limit]
                subprocess.run(command, check=True, capture_output=True)
        return self

    def __exit__(self, *_) -> None:
        for host in (0, 1):
            self.kill(host)
            ip("netns", "delete", self.names[host])

    def start(self, arguments: list[str], logs: Path, script: Path = SCRIPT) -> list[subprocess.Popen]:
        """
        Start one process on each host, as docs/scaling.md describes for two nodes.

        Args:
            arguments: Arguments of `script`.
            logs: Folder for the output of the hosts, `host0.log` and `host1.log`.
            script: Script to start.
        """
        logs.mkdir(parents=True, exist_ok=True)
        launches = []
        for rank, name in enumerate(self.names):
            command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"]
            command += ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(rank)]
            command += ["--master_addr", ADDRESSES[0], "--master_port", str(PORT), str(script), *arguments]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": INTERFACE}
            environment.pop("PYTHONWARNINGS", None)
            with (logs / f"host{rank}.log").open("w", encoding="utf-8") as log:
                log.write(f"{shlex.join(command)}\n")
                log.flush()
                launches.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        return launches

    def cut(self) -> None:
        """Cut the link: packets are dropped, and connections are not closed."""
        ip("-n", self.names[1], "link", "set", INTERFACE, "down")

    def mend(self) -> None:
        """Restore the link."""
        ip("-n", self.names[1], "link", "set", INTERFACE, "up")

    def kill(self, host: int) -> None:
        """Send SIGKILL to all processes of a host, including the launcher, like a power failure."""
        processes = [psutil.Process(int(pid)) for pid in ip("netns", "pids", self.names[host]).split()]
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue  # exited in the meantime
        psutil.wait_procs(processes, timeout=60)


def wait(launches: list[subprocess.Popen], timeout: float) -> list[float]:
    """
    Wait for all launchers; returns the seconds after which each exited.

    Raises:
        subprocess.TimeoutExpired: if one still runs after `timeout` seconds.
    """
    started = time.monotonic()
    seconds: list[float | None] = [None] * len(launches)
    while None in seconds:
        for index, launch in enumerate(launches):
            if seconds[index] is None and launch.poll() is not None:
                seconds[index] = time.monotonic() - started
        if time.monotonic() - started > timeout:
            raise subprocess.TimeoutExpired(launches[seconds.index(None)].args, timeout)
        time.sleep(0.02)
    return seconds


def wait_for(path: Path, launches: list[subprocess.Popen], timeout: float = 120) -> None:
    """
    Wait until `path` exists.

    Raises:
        RuntimeError: if the launchers exit or `timeout` seconds pass first.
    """
    started = time.monotonic()
    while not path.exists():
        if all(launch.poll() is not None for launch in launches) or time.monotonic() - started > timeout:
            raise RuntimeError(f"{path} was not created within {timeout:.0f} s")
        time.sleep(0.01)
