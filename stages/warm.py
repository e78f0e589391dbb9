"""Stages that begin with their imports done: a process that has imported torch, and is forked for every stage.

`import torch` and what else stages import takes longer than many a stage of the sample grid. While `stages.repro`
runs, `python -m stages.<stage>` hands its command line, folder, environment and standard streams over to a process
that waits here, a copy of which runs the stage. Without it, as under a plain `dvc repro`, they import for themselves.
"""

import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from contextlib import contextmanager
from importlib import import_module
from tempfile import TemporaryDirectory

# The environment's name for the socket's place.
PLACE = "EO_COMPOSE_WARM"
# Of other people's alone, and none that starts threads: they would not live on in a copy.
_MODULES = ("numpy", "pandas", "xarray", "zarr", "optuna", "sklearn.linear_model", "torch", "timm")
_MANY = 1 << 20


@contextmanager
def waiting():
    """A process that waits, for as long as the block lasts: the environment of those that are to use it."""
    with TemporaryDirectory() as folder:
        place = os.path.join(folder, "socket")
        command = [sys.executable, "-m", "stages.warm", place]
        with subprocess.Popen(command, stdin=subprocess.PIPE):  # it ends with its standard input, however we end
            yield {PLACE: place}


def hand_over() -> None:
    """Have a copy of the waiting process run this process's command, and end as it ends; return if none waits."""
    with socket.socket(socket.AF_UNIX) as line:
        try:
            line.connect(os.environ[PLACE])
        except OSError:
            return
        told = {"argv": sys.orig_argv[2:], "cwd": os.getcwd(), "environ": dict(os.environ)}
        socket.send_fds(line, [json.dumps(told).encode()], [0, 1, 2])
        ended = line.recv(1)
    # A copy that was killed says nothing.
    os._exit(ended[0] if ended else 1)


def serve(place: str) -> None:
    """Import, and run what comes through a socket at `place`, each in a copy, until standard input ends."""
    for name in _MODULES:
        import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal it is meant for the stages
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(place)
        door.listen()
        while sys.stdin not in select.select([door, sys.stdin], [], [])[0]:
            line, _ = door.accept()
            told, streams, *_ = socket.recv_fds(line, _MANY, 3)
            if os.fork() == 0:
                door.close()
                os._exit(_run(line, json.loads(told), streams))
            line.close()
            for stream in streams:
                os.close(stream)


def _run(line: socket.socket, told: dict, streams: list[int]) -> int:
    """Be the process that handed over; its exit status, which the socket is told too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for own, stream in enumerate(streams):
        os.dup2(stream, own)
        os.close(stream)
    os.chdir(told["cwd"])
    os.environ.clear()
    os.environ.update(told["environ"])
    module, *sys.argv[1:] = told["argv"]
    status = _status_of(module)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    line.sendall(bytes([status]))
    return status


def _status_of(module: str) -> int:
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve(sys.argv[1])
