"""Start two processes of one script that find each other over gloo."""

import os
import socket
import subprocess
import sys

import torch.distributed as dist


def free_port() -> int:
    """Return a TCP port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_two(script, *arguments) -> list[subprocess.Popen]:
    """Start ``script`` twice; it calls ``dist.init_process_group("gloo")`` itself."""
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "LORA_NULL_NO_EXTENSION": "1",
    }
    command = [sys.executable, str(script), *map(str, arguments)]
    return [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in range(2)]


def leave() -> None:
    """End a process of two successfully, without the interpreter's own end.

    There, one run in some ended in torch with "terminate called without an active exception", all work done.
    """
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_two(script, *arguments, timeout: float = 120) -> None:
    """Run ``script`` in two processes to its end; AssertionError if one fails or hangs."""
    processes = start_two(script, *arguments)
    try:
        assert [process.wait(timeout) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
