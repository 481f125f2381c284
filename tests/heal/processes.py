"""Processes that heal, alone or two together: as torchrun starts them, or forked from one that has imported everything.

To import torch, transformers and accelerate takes several times as long as to heal a tiny model. What torchrun adds to
two forked processes are the variables below, and that it ends one when the other dies.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from tests.conftest import ROOT

HEAL = """
import sys
from hyconvert.heal import heal
from hyconvert.recipe import HealRecipe
heal(sys.argv[1], sys.argv[2], HealRecipe.model_validate_json(sys.argv[3]), device="cpu")
"""
IMPORTED = [
    "accelerate",
    "hyconvert.heal.run",
    "hyconvert.modeling",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
]
SECONDS = 120


class Ended(NamedTuple):
    """How they ended: 0 where all did well, else an exit code or minus a signal; and what they wrote to stderr."""

    code: int
    output: str


def launched(arguments: list[str], folder: Path, variables: dict[str, str], before: str = "") -> Ended:
    """Heal in two processes of torchrun, in which `before` is run first."""
    script = folder / "heal.py"
    script.write_text(before + HEAL)
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(script), *arguments],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | variables,
        capture_output=True, check=False, timeout=SECONDS,
    )  # fmt: skip
    return Ended(done.returncode, done.stderr.decode())


def forked(
    arguments: list[str], folder: Path, variables: dict[str, str], before: str = "", count: int = 2
) -> Ended:
    """Heal in `count` processes of a fork server, in which `before` is run first."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    logs = [folder / f"process-{rank}.log" for rank in range(count)]
    threads = 1 if count > 1 else torch.get_num_threads()  # sums in one process depend on their number
    places = [_place(rank, port) if count > 1 else {} for rank in range(count)]
    processes = [
        context.Process(target=_run, args=(before + HEAL, arguments, variables | place, str(log), threads))
        for place, log in zip(places, logs, strict=True)
    ]
    for process in processes:
        process.start()
    try:
        while not any(process.exitcode for process in processes):
            alive = [process.sentinel for process in processes if process.is_alive()]
            if not alive:
                break
            assert multiprocessing.connection.wait(alive, SECONDS), f"nothing ended in {SECONDS} s"
    finally:
        for process in processes:
            process.terminate()
            process.join()
    codes = [process.exitcode or 0 for process in processes]
    return Ended(next(filter(None, codes), 0), "".join(log.read_text() for log in logs))


def _place(rank: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets for one of two processes on one machine."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def _run(script: str, arguments: list[str], variables: dict[str, str], log: str, threads: int) -> None:
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 2)
    os.environ.update(variables)
    sys.argv[1:] = arguments
    torch.set_num_threads(threads)
    exec(compile(script, "heal.py", "exec"), {"__name__": "__main__"})
