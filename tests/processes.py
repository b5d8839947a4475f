"""Runs of several processes, and runs that die: forks of another interpreter, never of the one that runs the tests.

That one has computed on several threads, and its forks hang. The other one only imports what is asked of it, once for
all tests, and computes nothing itself, so that its forks need not import torch.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

LONGEST = 240  # seconds


def apart(function: str, *words: object) -> Any:
    """What ``package.module:function`` of the tests returns in a process of its own, given ``words`` as strings.

    It has the environment and the working folder of the caller. The answer travels as JSON.
    """
    server = _server()
    assert server.stdin and server.stdout
    with TemporaryDirectory() as folder:
        answer, said = Path(folder, "answer"), Path(folder, "said")
        task = {"function": function, "words": [*map(str, words)], "env": _environment(), "cwd": os.getcwd()}
        said.touch()
        print(json.dumps(task | {"answer": str(answer), "said": str(said)}), file=server.stdin, flush=True)
        status = server.stdout.readline().strip()
        assert status == "0", f"ended with {status or 'its server'}: " + said.read_text()[-4000:]
        return json.loads(answer.read_text())


def ranks(world: int, work: Callable[[int], object]) -> list[int]:
    """Let each of ``world`` processes of one run do ``work(rank)``; their exit codes, minus the signal's number."""
    assert "PYTEST_CURRENT_TEST" not in os.environ, "call this in `apart`"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if not child:
            if world > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            work(rank)
            os._exit(0)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@functools.cache
def _server() -> subprocess.Popen[str]:
    """An interpreter that forks one process for each line of its input, and ends with the one that runs the tests."""
    command = [sys.executable, __file__]
    return subprocess.Popen(command, env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _environment() -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return env | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # where what is printed by imports does no harm
    for line in sys.stdin:
        task = json.loads(line)
        child = os.fork() if _imported(task) else None
        if child == 0:
            answers.close()
            os._exit(_work(task))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child else 1, file=answers, flush=True)


def _imported(task: dict[str, Any]) -> bool:
    """Whether the module of a task can be imported, from which it is forked."""
    try:
        importlib.import_module(task["function"].partition(":")[0])
    except BaseException:
        Path(task["said"]).write_text(traceback.format_exc())
        return False
    return True


def _work(task: dict[str, Any]) -> int:
    """Do a task in a process of its own; its exit status."""
    signal.alarm(LONGEST)
    with open(task["said"], "w") as said:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
        try:
            os.environ.clear()
            os.environ.update(task["env"])
            os.chdir(task["cwd"])
            module, _, name = task["function"].partition(":")
            found = getattr(sys.modules[module], name)(*task["words"])
            Path(task["answer"]).write_text(json.dumps(found))
        except BaseException:
            traceback.print_exc()
            return 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
    return 0


if __name__ == "__main__":
    _serve()
