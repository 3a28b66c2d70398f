"""Commands run by copies of one process that has imported the package: a start takes milliseconds instead of seconds.

A copy runs its program as `__main__` and exits like an interpreter of its own. Only what is read during imports, such
as HF_HOME, is that of the server: tests that change it, and tests of launchers, start an interpreter.
"""

import atexit
import functools
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path


IMPORTS = [
    "mocov3_hf.data.workers",
    "mocov3_hf.evaluation.finetune",
    "mocov3_hf.evaluation.linear_probe",
    "mocov3_hf.hub",
    "mocov3_hf.pretraining.pretrain",
    "torch.nn.parallel",
]


def serve() -> None:
    """Fork for every line of JSON on stdin, or wait for a process; the answers are on stdout."""
    for name in IMPORTS:
        importlib.import_module(name)
    running, ended = set(), {}
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            while not (found := ended.keys() & set(request["wait"])):
                process_id, status = os.wait()
                running.discard(process_id)
                ended[process_id] = os.waitstatus_to_exitcode(status)
            process_id = found.pop()
            print(process_id, ended.pop(process_id), flush=True)
        elif process_id := os.fork():
            running.add(process_id)
            print(process_id, flush=True)
        else:
            return become(**request)
    for process_id in running:  # of tests that failed
        os.killpg(process_id, signal.SIGKILL)


def become(command: list[str], environment: dict[str, str], folder: str, output: str) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    nothing, written = os.open(os.devnull, os.O_RDONLY), os.open(output, os.O_WRONLY | os.O_CREAT)
    for opened, number in ((nothing, 0), (written, 1), (written, 2)):
        os.dup2(opened, number)
    os.close(nothing)
    os.close(written)
    program, *arguments = command
    if program == "-c":
        sys.argv = ["-c", *arguments[1:]]
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(program).parent))
        runpy.run_path(program, run_name="__main__")


@functools.cache
def server() -> subprocess.Popen:
    """That of this test process, started at the first use."""
    code = "from tests.fork_server import serve; serve()"
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    environment.pop("PYTHONWARNINGS", None)
    started = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    atexit.register(started.communicate)  # closes its stdin
    return started


def ask(request: dict) -> list[int]:
    """An answer. If nobody waits for it, as after the time limit of a test, the next test gets a new server."""
    assert server().poll() is None, f"the process that forks was ended by a test: {server().returncode}"
    try:
        server().stdin.write(json.dumps(request) + "\n")
        server().stdin.flush()
        return [int(word) for word in server().stdout.readline().split()]
    except BaseException:
        server().kill()
        server.cache_clear()
        raise


def start(command: list[str], environment: Mapping[str, str], output: Path) -> int:
    """The id of a new process, in its own group, that runs `FILE ARGUMENTS` or `-c CODE ARGUMENTS`."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    variables.pop("PYTHONWARNINGS", None)
    request = {"command": command, "environment": variables, "folder": os.getcwd(), "output": str(output)}
    (process_id,) = ask(request)
    return process_id


class Forked:
    """The parts of `subprocess.Popen` that the tests use; stdout and stderr are one pipe."""

    def __init__(self, command: list[str], **environment: str):
        with tempfile.TemporaryDirectory() as folder:
            pipe = Path(folder, "output")
            os.mkfifo(pipe)
            self.pid = start(command, environment, pipe)
            self.stdout = pipe.open(encoding="utf-8")  # waits for the process to open its end
        self.returncode: int | None = None

    def communicate(self) -> tuple[str, None]:
        """What is left of the output; waits for the end."""
        with self.stdout:
            text = self.stdout.read()
        _, self.returncode = ask({"wait": [self.pid]})
        return text, None


def ranks(num_processes: int, file: Path, *arguments: str, check: bool = True) -> tuple[list[int], str]:
    """
    Run `file` in several processes with the variables of torchrun.

    Returns their exit codes and outputs. With `check`, the first failure ends all and is raised instead.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {name: str(num_processes) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    codes: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(rank)) for rank in range(num_processes)]
        running = {}
        for rank, output in enumerate(outputs):
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            running[start([str(file), *arguments], environment, output)] = output
        try:
            while running:
                process_id, code = ask({"wait": list(running)})
                output = running.pop(process_id)
                codes.append(code)
                if check and code != 0:
                    raise AssertionError(f"{file} {' '.join(arguments)} ended with {code}:\n{output.read_text()}")
        finally:
            for process_id in running:
                os.kill(process_id, signal.SIGKILL)
        return codes, "".join(output.read_text() for output in outputs)
