"""Run stages in forks of a process that has imported torch already.

Importing torch and other libraries takes longer than many stages of the sample grid. While `stages.repro` runs,
`python -m stages.<stage>` sends its command line, folder, environment and standard streams to a waiting process, and
a fork of it runs the stage. Without that process, as under a plain `dvc repro`, each stage runs its own imports.
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

# Environment variable with the path of the socket.
SOCKET_VARIABLE = "EO_COMPOSE_WARM"
# Third-party modules that start no threads: a fork would not have them.
PRELOADED_MODULES = ("numpy", "pandas", "xarray", "zarr", "optuna", "sklearn.linear_model", "torch", "timm")
MAX_MESSAGE_BYTES = 1 << 20


@contextmanager
def warm_process():
    """Start the waiting process for the duration of the block.

    Yields:
        The environment variable that its clients need.
    """
    with TemporaryDirectory() as folder:
        socket_path = os.path.join(folder, "socket")
        command = [sys.executable, "-m", "stages.warm", socket_path]
        with subprocess.Popen(command, stdin=subprocess.PIPE):  # it ends when its standard input closes
            yield {SOCKET_VARIABLE: socket_path}


def hand_over() -> None:
    """Run this process's command in the waiting process and exit with its status.

    Returns if no process waits.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(os.environ[SOCKET_VARIABLE])
        except OSError:
            return
        message = {"argv": sys.orig_argv[2:], "cwd": os.getcwd(), "environ": dict(os.environ)}
        socket.send_fds(connection, [json.dumps(message).encode()], [0, 1, 2])
        status = connection.recv(1)
    # A killed fork sends no status.
    os._exit(status[0] if status else 1)


def serve(socket_path: str) -> None:
    """Import, then run each command from a socket in a fork, until standard input closes."""
    for name in PRELOADED_MODULES:
        import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt from the terminal is for the stages
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(socket_path)
        listener.listen()
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            message, streams, *_ = socket.recv_fds(connection, MAX_MESSAGE_BYTES, 3)
            if os.fork() == 0:
                listener.close()
                os._exit(_run(connection, json.loads(message), streams))
            connection.close()
            for stream in streams:
                os.close(stream)


def _run(connection: socket.socket, message: dict, streams: list[int]) -> int:
    """Run a client's command in this fork; send the exit status to the client and return it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for descriptor, stream in enumerate(streams):
        os.dup2(stream, descriptor)
        os.close(stream)
    os.chdir(message["cwd"])
    os.environ.clear()
    os.environ.update(message["environ"])
    module, *sys.argv[1:] = message["argv"]
    status = _status_of(module)
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(bytes([status]))
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
