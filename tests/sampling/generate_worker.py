"""Generation by several processes, and by one that dies, for `test_generate.py`."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from processes import ranks

from visiontune.errors import UserError
from visiontune.sampling import generate as module
from visiontune.sampling import sheets
from visiontune.sampling.config import SampleConfig
from visiontune.schema import from_mapping

write = module.write_image


def config(options: str) -> SampleConfig:
    return from_mapping(SampleConfig, json.loads(options))


def two(folder: str, *options: str) -> list[int]:
    """The exit codes of two processes that share configs, with a log of every file written and every error raised."""

    def work(rank: int) -> None:
        def log(text: str) -> None:
            with Path(folder, f"log{rank}").open("a") as file:
                file.write(f"{text}\n")

        module.write_image = sheets.write_image = lambda path, *given, **named: [
            log(path.name),
            write(path, *given, **named),
        ][1]
        for one in options:
            try:
                module.generate(config(one))
            except UserError as error:
                log(str(error))

    return ranks(2, work)


def one_dies(options: str) -> list[int]:
    """The exit codes of two processes, of which the second is killed while it writes its second picture."""
    drawn = config(options)

    def work(rank: int) -> None:
        calls = []

        def dying(*given: Any, **named: Any) -> str:
            calls.append(given)
            if rank == 1 and len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(*given, **named)

        module.write_image = dying
        module.generate(drawn)

    return ranks(2, work)


def killed(options: str) -> list[int]:
    """The exit code of a process that takes its time for an image, and is killed some time after its first line."""
    drawn = config(options)

    def kill() -> None:
        while not Path(drawn.out, "manifest.jsonl").exists():
            time.sleep(0.05)
        time.sleep(0.4)
        os.kill(os.getpid(), signal.SIGKILL)

    def work(rank: int) -> None:
        module.write_image = lambda *given, **named: [time.sleep(0.3), write(*given, **named)][1]
        threading.Thread(target=kill, daemon=True).start()
        module.generate(drawn)

    return ranks(1, work)
