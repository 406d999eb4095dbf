"""Python that starts warm: processes forked from one that has imported torch, scanpy and the package, and compiled UMAP.

Each is a process of its own and a child of the test, with its own arguments, environment, files, signals and exit code;
only the imports, some ten seconds of a core, are paid once. What proves that a plain start works stays with subprocess.
A test that uses it is marked slow, so that `make test-fast` does not pay for the first process.
"""
import atexit
import ctypes
import gc
import importlib
import inspect
import json
import os
import runpy
import socket
import subprocess
import sys
import time
from functools import cache
from types import ModuleType
from unittest import mock

SUBREAPER = 36  # of prctl: orphans among the descendants become children of this process


# ---- in the test

@cache
def server():
    "The socket of the process that forks, which ends when this one does."
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ctypes.CDLL(None).prctl(SUBREAPER, 1)
    env = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    words = [sys.executable, "-P", __file__, str(theirs.fileno())]
    process = subprocess.Popen(words, env=env, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    atexit.register(lambda: (process.kill(), process.wait()))
    theirs.close()
    return ours


class Popen(subprocess.Popen):
    "subprocess.Popen of `python -c CODE`, `python -m MODULE` or `python FILE`, with their arguments."
    def _execute_child(self, *args):
        given = inspect.signature(super()._execute_child).bind(*args).arguments
        python, *words = [os.fspath(word) for word in given["args"]]
        assert python == sys.executable and words[0] in ("-c", "-m") or words[0].endswith(".py"), words
        request = dict(words=words, parent=os.getpid(), alone=given["start_new_session"],
            env=dict(os.environ if given["env"] is None else given["env"]), cwd=os.fspath(given["cwd"] or os.getcwd()))
        files = [given["p2cread"], given["c2pwrite"], given["errwrite"]]
        files = [i if file == -1 else file for i, file in enumerate(files)]
        socket.send_fds(server(), [json.dumps(request).encode()], files)
        self.pid, self._child_created = int(server().recv(100)), True
        self._close_pipe_fds(*(given[f] for f in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")))


if sys.platform != "linux":
    Popen = subprocess.Popen


def run(words, timeout=None, **how):
    "subprocess.run with what it says as text."
    with Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how) as process:
        out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def kernels():
    "While this is open, kernels are forked too."
    return mock.patch("jupyter_client.launcher.Popen", Popen)


# ---- in the process that forks

def prepare():
    "Import what tests and pages import, and compile UMAP; no thread may run afterwards."
    os.environ["JPY_PARENT_PID"] = str(os.getppid())  # with which a kernel ends; read when ipykernel is imported
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    for name in ("ipykernel.kernelapp", "lightning.fabric", "matplotlib.pyplot", "scanpy", "umap"):
        importlib.import_module(name)
    import numpy as np

    import scformer_nb as scf
    for name in scf.__all__:
        getattr(scf, name)
    scf.plots.umap(np.random.default_rng(0).normal(size=(40, 3)))
    gc.freeze()


def fork(channel):
    "Wait for requests; it comes back in the new process."
    while True:
        message, files, *_ = socket.recv_fds(channel, 1 << 20, 3)
        if not message:
            os._exit(0)
        if not (middle := os.fork()):  # it ends at once, so that the new process becomes the test's child
            between = os.getpid()
            if os.fork():
                os._exit(0)
            return json.loads(message) | {"between": between}, files
        os.waitpid(middle, 0)
        for file in files:
            os.close(file)


def become(words, parent, alone, env, cwd, between, files, channel):
    "Take over what belongs to a process; end where who asked for it has been killed meanwhile."
    import numpy as np
    while os.getppid() == between:
        time.sleep(.001)
    if os.getppid() != parent:
        os._exit(1)
    if alone:
        os.setsid()
    channel.send(str(os.getpid()).encode())
    channel.close()
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    np.random.seed()
    there = [folder for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:] = there + [folder for folder in sys.path if folder not in before]


def execute(words):
    "As python itself does."
    kind, *rest = words
    sys.argv = words if kind.endswith(".py") else [kind, *rest[1:]]
    if kind == "-c":
        sys.path.insert(0, "")
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)  # noqa: S102 as python -c
    elif kind == "-m":
        sys.path.insert(0, os.getcwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(kind)))
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    channel = socket.socket(fileno=int(sys.argv[1]))
    prepare()
    request, files = fork(channel)
    become(**request, files=files, channel=channel)
    execute(request["words"])
