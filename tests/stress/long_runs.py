"""Long runs: memory and open files stay as they are, processes end with their parent, signals leave what was finished."""
import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import attack
import numpy as np
import psutil
from attack import must
from report import record

PART = "long runs"
SLOW_PAGE = '''dataset: str = "toy"  # a name, or an .h5ad
full: bool = False  # all
out: str = "out"  # folder
====
import os, time
from pathlib import Path
Path(out, "pid").write_text(str(os.getpid()))
time.sleep(600)'''
STEPS, EMBEDDINGS, FILES = 2000, 50, 30


def resident():
    gc.collect()
    return psutil.Process().memory_info().rss


def until(holds, seconds, text):
    "Wait for something. Raises AssertionError when it does not come."
    end = time.monotonic() + seconds
    while not holds():
        must(time.monotonic() < end, text)
        time.sleep(.05)


def alive(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# ---- one process that works for long

def flat_over_steps():
    "Resident memory after each epoch of 2,000 steps, against that after the first tenth."
    import toy

    from scformer_nb.training import ScFormerTask
    seen, validate = [], ScFormerTask.validate

    def watched(task, device):
        seen.append(psutil.Process().memory_info().rss)
        return validate(task, device)
    ScFormerTask.validate = watched
    try:
        toy.model(epochs=STEPS // 4)
    finally:
        ScFormerTask.validate = validate
    must(len(seen) * 4 == STEPS, f"{len(seen)} epochs")
    warm, rest = max(seen[:len(seen) // 10]), max(seen[len(seen) // 10:])
    must(rest < 1.05 * warm, f"{warm / 1e6:.0f} MB grew to {rest / 1e6:.0f} MB")
    return f"{warm / 1e6:.0f} MB, later at most {100 * (rest / warm - 1):+.1f}%"


def flat_over_embeddings(place):
    import toy
    made = toy.model(epochs=1)
    for _ in range(5):
        made.embed_cells(place / "cells.h5ad")
    warm = resident()
    for _ in range(EMBEDDINGS):
        made.embed_cells(place / "cells.h5ad")
    must((now := resident()) < 1.05 * warm, f"{warm / 1e6:.0f} MB grew to {now / 1e6:.0f} MB")
    return f"{warm / 1e6:.0f} MB, {100 * (now / warm - 1):+.1f}%"


def handles(place):
    "Open files after 30 times of loading a model and cells, embedding them and scoring."
    import toy

    from scformer_nb import ScFormer
    from scformer_nb.datasets import load
    from scformer_nb.metrics import evaluate
    toy.model(epochs=1).save(place / "small")

    def once():
        cells = load(str(place / "cells.h5ad"))
        Z = ScFormer.load(place / "small").embed_cells(place / "cells.h5ad")
        evaluate(Z, cells.obs, "cell_type")
    once()
    before = psutil.Process().num_fds()
    for _ in range(FILES):
        once()
    must((now := psutil.Process().num_fds()) <= before, f"{before} open files became {now}")
    return f"{before} open files before and after"


# ---- processes that belong to another

def started(name, place, out):
    "A command that has finished an epoch, or whose page is at work."
    words = attack.commands(place, epochs=100_000)[name]
    process = attack.start([*words, out], place, tmp=place)
    ready = out / "work/pid" if name == "run" else out / "last.ckpt"
    until(lambda: ready.exists() and ready.stat().st_size or process.poll() is not None, 120, f"{name} does not begin")
    must(process.poll() is None, f"{name} ended: {process.poll()}")
    return process


def end_of(process, name, out):
    "Those that it started, a page's kernel among them."
    found = psutil.Process(process.pid).children(recursive=True)
    if name == "run":
        found.append(psutil.Process(int((out / "work/pid").read_text())))
    return found


def kernel_dies_with_its_parent(place):
    out = place / "killed run"
    process = started("run", place, out)
    children = end_of(process, "run", out)
    process.kill()
    process.communicate()
    until(lambda: not any(map(alive, children[-1:])), 20, "the kernel lives on")
    return "within seconds"


def second_process_dies_with_the_first(place):
    "Of two processes of gloo the first is killed; the other one waits for it in vain."
    out, scformer = place / "two", Path(sys.executable).with_name("scformer")
    words = ["fit", place / "cells.h5ad", "--batch-key", "batch", "--epochs", "100000", "--accelerator", "cpu", "--devices", "2", "-o", out]
    with (place / "said").open("w") as said:
        process = subprocess.Popen([sys.executable, scformer, *map(str, words)], stdout=said, stderr=said, start_new_session=True)
    try:
        until(lambda: (out / "last.ckpt").exists() or process.poll() is not None, 200, "two processes do not begin")
        must(process.poll() is None, (place / "said").read_text()[-300:])
        children = psutil.Process(process.pid).children(recursive=True)
        must(len(children) >= 1, "there is no second process")
        process.kill()
        process.wait()
        began = time.monotonic()
        until(lambda: not any(map(alive, children)), 60, f"{sum(map(alive, children))} of {len(children)} live on")
        return f"after {time.monotonic() - began:.0f} s"
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def signalled(name, number, place):
    "The command ends in order: what was finished is there, no traceback is shown and no process stays."
    out = place / f"{name} {number.name}"
    process = started(name, place, out)
    children = end_of(process, name, out)
    process.send_signal(number)
    done = attack.wait(process, 60)
    must(done.returncode == 128 + number and "Traceback" not in done.stderr, f"code {done.returncode}: {done.stderr[-300:]}")
    until(lambda: not any(map(alive, children)), 20, "a process stays")
    if name != "run":
        import torch
        must(torch.load(out / "last.ckpt", weights_only=True)["rows"], "no checkpoint")
    must(not list(out.glob(".*.*.*")), f"left: {[p.name for p in out.iterdir()]}")
    return f"code {done.returncode}"


# ---- all of it

def attempt(case, of, *args):
    "One line of the results."
    began = time.monotonic()
    try:
        note, passed = of(*args), 1
    except Exception as error:
        note, passed = f"{type(error).__name__}: {error}", 0
    return record(PART, case, passed, 1, time.monotonic() - began, note)


def main(place):
    attack.PAGE = SLOW_PAGE
    attack.write_data(place)
    cases = {f"memory over {STEPS:,} steps": (flat_over_steps,), f"memory over {EMBEDDINGS} embeddings": (flat_over_embeddings, place),
        f"open files over {FILES} evaluations": (handles, place), "the kernel of a killed run": (kernel_dies_with_its_parent, place),
        "the second process of a killed fit": (second_process_dies_with_the_first, place)}
    for name in ("fit", "pretrain", "perturb", "run"):
        for number in (signal.SIGINT, signal.SIGTERM):
            cases[f"{name}: {number.name}"] = (signalled, name, number, place)
    chosen = [case for case in cases if not sys.argv[1:] or any(word in case for word in sys.argv[1:])]
    return all([attempt(case, *cases[case]) for case in chosen])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    np.random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(not main(Path(folder)))
