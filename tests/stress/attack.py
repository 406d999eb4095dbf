"""Commands of the library as processes that are killed, starved or crowded: what the parts of `make stress` share.

A process starts warm (tests/warm.py), with toy recipes, and obeys a plan: {"op": 7} kills it before its seventh change
of a folder, {"cpu": .2} after so many seconds of its own, {"wall": 1} of the clock, {"byte": 5000} when a file grows
over that; {"room": 5000}, {"handles": 40}, {"rights": 0} take something away from it instead.
"""
import atexit
import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
SETTINGS = {"PYTHONPATH": os.pathsep.join(sys.path[:3]), "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}  # of all that is started

import warm  # noqa: E402

CODE = "import attack; attack.obey()"
one_at_a_time = threading.Lock()


# ---- in the process that is attacked

def obey():
    "Take the plan from the environment, then run what the arguments name."
    plan, words = json.loads(os.environ["ATTACK"]), sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
    with_small_models()
    facts = watch_changes(plan)
    started = time.monotonic()
    atexit.register(lambda: tell(plan, dict(facts, cpu=time.process_time(), wall=time.monotonic() - started)))
    if "rights" in plan:
        obey_permissions()
    for kind, limit in (("byte", resource.RLIMIT_FSIZE), ("room", resource.RLIMIT_FSIZE), ("handles", resource.RLIMIT_NOFILE)):
        if kind in plan:
            resource.setrlimit(limit, (plan[kind], plan[kind]))
    if "byte" in plan:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    if words[0] == "run":
        fork_kernels()
    if "gate" in plan:  # where all wait for the last
        Path(f"{plan['gate']}_{os.getpid()}").touch()
        while not os.path.exists(plan["gate"]):
            time.sleep(.002)
        time.sleep(plan.get("late", 0))
    for kind, clock in (("cpu", time.CLOCK_PROCESS_CPUTIME_ID), ("wall", time.CLOCK_MONOTONIC)):
        if kind in plan:
            kill_after(plan[kind], clock)
    run(words)


def run(words):
    "A command, or one of the functions below."
    import typer

    from scformer_nb import cli
    if words[0] not in OWN:
        cli.app(words)
    try:
        with cli.report_errors():
            OWN[words[0]](*words[1:])
    except typer.Exit as e:
        sys.exit(e.exit_code)


def tell(plan, facts):
    if "report" in plan:
        Path(plan["report"]).write_text(json.dumps(facts))


def with_small_models():
    "Toy recipes, a page of a second, parts of twenty cells."
    import toy

    from scformer_nb import data, recipe, runner
    from scformer_nb.batch_correction import BatchShift
    from scformer_nb.perturbation import PerturbationModel
    recipe.DEFAULT, BatchShift.steps = toy.RECIPE, 20
    init = PerturbationModel.__init__
    init.__defaults__ = (*init.__defaults__[:-1], toy.SMALL_SCREEN)
    runner.pages = lambda: {"toy": Path(os.environ["TOY_PAGE"])}
    data.PART = 20


def fork_kernels():
    "A process that forks kernels, as long as this one lives."
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ctypes.CDLL(None).prctl(warm.SUBREAPER, 1)
    if not os.fork():
        ours.close()
        request, files = warm.fork(theirs)
        warm.become(**request, files=files, channel=theirs)
        warm.execute(request["words"])
        os._exit(0)
    theirs.close()
    warm.server = lambda: ours
    warm.kernels().start()


CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watch_changes(plan):
    "Count what changes files in a folder, and kill this process before one of them."
    facts, folder, pid = {"ops": 0}, plan.get("folder"), os.getpid()

    def count():
        if os.getpid() == pid:
            facts["ops"] += 1
            if facts["ops"] == plan.get("op"):
                os.kill(pid, signal.SIGKILL)

    def hook(event, args):
        if event in CHANGES and (event != "open" or (args[2] or 0) & WRITES) and folder in os.fsdecode(args[0]):
            count()

    def counted(function):
        def call(*args):
            count()
            return function(*args)
        return call

    if folder:
        sys.addaudithook(lambda event, args: None if isinstance(args[0] if args else 0, int) else hook(event, args))
        for name in ("fsync", "posix_fallocate", "write"):
            setattr(os, name, counted(getattr(os, name)))
    return facts


def obey_permissions():
    "Root may write anywhere; without three of its capabilities it may not."
    libc = ctypes.CDLL(None)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    sets[0] &= ~0b1110  # effective: DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER
    assert libc.capset(header, sets) == 0


def kill_after(seconds, clock):
    "SIGKILL from the kernel's own timer."
    libc, timer = ctypes.CDLL(None), ctypes.c_void_p()
    event = (ctypes.c_int * 16)(0, 0, signal.SIGKILL, 0)  # value, signal, how: a signal
    assert libc.timer_create(clock, ctypes.byref(event), ctypes.byref(timer)) == 0
    when = (ctypes.c_long * 4)(0, 0, int(seconds), int(seconds % 1 * 1e9) + 1)
    assert libc.timer_settime(timer, 0, ctypes.byref(when), None) == 0


def ledger(path, first="0", n="1"):
    "Finished runs, a line each."
    from scformer_nb.ledger import Ledger
    for seed in range(int(first), int(first) + int(n)):
        Ledger(path).get_or_run("cells", "PCA", "x" * 3000, seed, {}, lambda seed=seed: {"AvgBIO": seed})


def writing(source, path):
    "A ledger line, cells sorted on disk, and the file made of them."
    import anndata
    from scipy import sparse

    from scformer_nb.data import CountReader
    from scformer_nb.datasets import open_cells
    from scformer_nb.writable import write_h5ad
    ledger(Path(path).with_suffix(".jsonl"))
    with open_cells(source) as cells:
        reader = CountReader(cells)
        X = sparse.vstack([part.X for part in reader.parts()])
        write_h5ad(anndata.AnnData(X.tocsr(), obs=reader.obs), Path(path))


def note(file):
    "A download whose sha256 nobody has stated."
    from scformer_nb import datasets
    folder = datasets.data_dir()
    datasets.FILES.update({name: ((folder.parent / name).as_uri(), None) for name in map("{}.txt".format, range(20))})
    import pooch

    def copy(url, known, name, folder):
        Path(folder, name).write_bytes(Path(folder).parent.joinpath(name).read_bytes())
        return str(Path(folder, name))
    pooch.retrieve = copy
    datasets.fetch(file)


def keep(out, number):
    "Arrays of a run, beside those of others."
    import numpy as np

    from scformer_nb.experiment import Results
    Path(out).mkdir(exist_ok=True)
    Results("toy", "cells", out).keep(f"run {number}", Z=np.arange(2000.))


OWN = dict(ledger=ledger, writing=writing, note=note, keep=keep)


# ---- in the process that attacks

PAGE = '''dataset: str = "toy"  # a name, or an .h5ad
full: bool = False  # all
out: str = "out"  # folder
====
import numpy as np, matplotlib.pyplot as plt
from scformer_nb.experiment import Results
from scformer_nb.plots import save_figure
results = Results("toy", "cells", out)
def run(seed):
    results.keep(f"run {seed}", Z=np.arange(2000.) * seed)
    return {"AvgBIO": seed / 10}
for seed in range(4):
    results.ledger.get_or_run("toy", "half", "default", seed, {}, lambda: run(seed))
====
fig, ax = plt.subplots()
ax.plot([results.arrays[f"run {seed}, Z"].sum() for seed in range(4)])
save_figure(fig, results.path("curve"))'''


def write_page(path):
    import nbformat
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
    parameters, *cells = PAGE.split("====\n")
    made = [new_markdown_cell("# Toy\n\n> For tests"), new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        new_markdown_cell("## Runs"), *map(new_code_cell, cells)]
    spec = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(new_notebook(cells=made, metadata=spec), path)


def write_data(place):
    "Cells by rows and by columns, two studies, a screen, a page."
    import toy

    from scformer_nb.simulate import simulate, simulate_perturbations
    toy.CELLS.write_h5ad(place / "cells.h5ad")
    columns = toy.toy()
    columns.X = columns.X.tocsc()
    columns.write_h5ad(place / "columns.h5ad")
    studies = simulate(80, 70, 3, 2)
    studies[:40, :60].copy().write_h5ad(place / "one.h5ad")
    studies[40:, 10:].copy().write_h5ad(place / "two.h5ad")
    simulate_perturbations(n_genes=40, n_targets=8, n_doubles=10, n_cells=12, seed=3).write_h5ad(place / "screen.h5ad")
    write_page(place / "50_exp_toy.ipynb")


def commands(place, epochs=3):
    "Words of each command, all but where it writes."
    n = ["--epochs", str(epochs)]
    return dict(
        fit=["fit", place / "cells.h5ad", "--batch-key", "batch", *n, "-o"],
        pretrain=["fit", place / "one.h5ad", place / "two.h5ad", *n, "-o"],
        perturb=["perturb", "fit", place / "screen.h5ad", "--direction", "up", *n, "-o"],
        linear=["perturb", "fit", place / "screen.h5ad", "--direction", "up", "-o"],
        predict=["perturb", "predict", place / "linear", "gene0", "-o"],
        embed=["embed", place / "model", place / "cells.h5ad", "-o"],
        run=["run", "toy", place / "cells.h5ad", "-o"],
        writing=["writing", place / "columns.h5ad"],
        ledger=["ledger"])


def start(words, place, cwd=None, **plan):
    "A process that runs a command under a plan."
    env = os.environ | {"ATTACK": json.dumps(plan, default=str), "TOY_PAGE": str(place / "50_exp_toy.ipynb"), "TQDM_DISABLE": "1",
        "SCFORMER_DATA_DIR": str(place / "data"), "TMPDIR": str(plan.get("tmp", place)), "COLUMNS": "300", "TERM": "dumb"} | SETTINGS
    env |= plan.get("env", {})
    with one_at_a_time:
        return warm.Popen([sys.executable, "-c", CODE, *map(str, words)], env=env, cwd=cwd or place, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def wait(process, timeout=120):
    "Its end: code, what it printed, what it complained of. What hangs is killed."
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise AssertionError(f"no end after {timeout} s") from None
    return subprocess.CompletedProcess(process.args[3:], process.returncode, out, err)


def call(words, place, **plan):
    return wait(start(words, place, **plan))


def together(jobs, place, gate):
    "Commands with their delays in seconds, at once: how each of them ended."
    started = [start(words, place, gate=str(gate), late=late, tmp=place) for words, late in jobs]
    while len(list(gate.parent.glob(f"{gate.name}_*"))) < len(jobs):
        must(all(process.poll() is None for process in started), "one of them ended at once")
        time.sleep(.01)
    gate.touch()
    return [wait(process) for process in started]


def must(holds, text):
    if not holds:
        raise AssertionError(text)


def check_done(done):
    must(done.returncode == 0 and "Traceback" not in done.stderr, f"{done.args}: code {done.returncode}: {done.stderr[-600:]}")


def check_refused(done, *said):
    "A failure is a line on stderr that says why."
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    why = f"{done.args}: code {done.returncode}: {done.stderr[-600:]}"
    must(done.returncode in (1, 2) and len(lines) == 1 and lines[0].startswith("error: ") and not done.stdout, why)
    must(not said or any(text in lines[0] for text in said), why)


def listing(folder):
    "Relative path: content, of all files but locks."
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


def weights(folder):
    "A model's tensors and facts, what differs from run to run left out."
    import torch

    from scformer_nb.model_files import read_facts, read_weights
    try:
        facts = read_facts(folder)
    except ValueError as e:
        if "another kind" not in str(e):
            raise
        facts = read_facts(folder, kind="perturbation")
    history = [{k: v for k, v in row.items() if k not in ("seconds", "cells_per_second")} for row in facts["history"]]
    tensors = {k: torch.nan_to_num(v.double()).numpy().tobytes() for k, v in
        read_weights(folder, may_be_nan=("effects.own",)).items()}
    return tensors, {k: v for k, v in facts.items() if k != "versions"} | {"history": history}


def contents(path):
    "All arrays of an .h5ad by name."
    import h5py
    import numpy as np
    found = {}

    def add(name, x):
        if isinstance(x, h5py.Dataset) and not name.endswith(("seconds", "cells_per_second")):
            found[name] = repr(np.asarray(x[()]).tolist())
    with h5py.File(path) as file:
        file.visititems(add)
    return found


@contextmanager
def arena():
    "A folder with data, and a model in it."
    with tempfile.TemporaryDirectory(prefix="stress_") as name, mock.patch.dict(os.environ, SETTINGS):
        place = Path(name)
        write_data(place)
        place.chmod(0o755)
        check_done(call([*commands(place)["fit"], place / "model"], place))
        check_done(call([*commands(place)["linear"], place / "linear"], place))
        yield place


def attempt(cases, workers=2):
    "Functions by name, two at a time: how many passed, and what the others said."
    def one(case):
        try:
            case()
        except Exception as e:
            return f"{type(e).__name__}: {e}"
    with ThreadPoolExecutor(workers) as pool:
        said = dict(zip(cases, pool.map(one, cases.values()), strict=True))
    failed = {name: text for name, text in said.items() if text}
    for name, text in failed.items():
        print(f"FAILED {name}: {text}", flush=True)
    return len(cases) - len(failed), failed


def report_all(part, cases_of, note=""):
    "Attempt and record the cases of each name; the exit code."
    from report import record
    good = True
    for case, cases in cases_of.items():
        began = time.monotonic()
        passed, failed = attempt(cases)
        first = "; ".join(f"{name}: {text}" for name, text in failed.items())[:300]
        good &= record(part, case, passed, len(cases), time.monotonic() - began, first or note)
    return 0 if good else 1
