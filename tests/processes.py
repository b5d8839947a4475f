"""Runs of several processes, and runs that die: forks of a new interpreter, never of the one that runs the tests.

That one has computed on several threads, and its forks hang. A new one has not, and its forks need not import torch.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any


def apart(function: str, *words: object) -> Any:
    """What ``package.module:function`` of the tests returns in a new interpreter, given ``words`` as strings.

    The answer travels as JSON.
    """
    env = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, function, *map(str, words)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


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


if __name__ == "__main__":
    module, _, name = sys.argv[1].partition(":")
    print("\n" + json.dumps(getattr(importlib.import_module(module), name)(*sys.argv[2:])), flush=True)
