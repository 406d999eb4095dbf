"""kill -9 at random moments of six commands, at each change of a folder, at bytes of a file: what is on disk is whole,
and the command run again ends as the unbroken one did, to the last bit."""
import json
import re
import shutil
import sys
import warnings
from functools import partial

import attack
import numpy as np
from attack import call, check_done, must, report_all, weights
from report import drop_others

SIX = ("fit", "pretrain", "perturb", "embed", "run", "writing")
N = 20
BESIDE = re.compile(r"\.(.+)\.[0-9a-f]{16}")
# what a run leaves when nothing kills it, locks aside
MODEL = {"history.csv", "last.ckpt", "model.json", "weights.safetensors"}
PAGE = {"figures", "metrics.json", "report.html", "run.json", "toy.ipynb", "work"}
LEFT = dict(fit=MODEL, pretrain=MODEL, perturb=MODEL, linear={"model.json", "weights.safetensors"}, embed={"x.h5ad"}, predict={"x.h5ad"},
    run=PAGE, writing={"x.h5ad", "x.jsonl", "tmp"}, ledger={"x.jsonl"})


def target(folder, name):
    "Where a command writes: a folder, or a file in one."
    (folder / "tmp").mkdir(parents=True)
    files = dict(embed="x.h5ad", writing="x.h5ad", predict="x.h5ad", ledger="x.jsonl")
    return folder / files.get(name, "out")


def result(name, out):
    "What must be equal bit for bit."
    if name in ("embed", "writing", "predict"):
        return attack.contents(out)
    if name == "run":
        metrics, arrays = json.loads((out / "metrics.json").read_text()), np.load(out / "work/toy_cells.npz")
        return metrics["metrics"], {k: arrays[k].tobytes() for k in arrays}
    return lines(out) if name == "ledger" else weights(out)


def lines(path):
    "Runs of a ledger; of a line that is cut off its readers are told, and go on."
    from scformer_nb.ledger import read_lines
    with warnings.catch_warnings(action="ignore"):
        return [(run["seed"], run["metrics"]) for run in read_lines(path)]


# ---- what is on the disk, whenever a process ended

def check_model(folder, known):
    "A run's folder: each file whole, the model one that an unbroken run makes, or none."
    import pandas as pd
    import torch

    from scformer_nb.runs import PARTS
    if (folder / "last.ckpt").exists():
        state = torch.load(folder / "last.ckpt", weights_only=True)
        must(state.keys() >= set(PARTS), "the checkpoint lacks parts")
    if (folder / "history.csv").exists():
        must(1 <= len(pd.read_csv(folder / "history.csv")) <= 5, "the history has no epochs")
    if (folder / "weights.safetensors").exists():
        must(weights(folder) in known, "the model is neither the old nor the new one")
    must((folder / "weights.safetensors").exists() or not (folder / "model.json").exists(), "the weights are lost")


def check_page(folder):
    "Each file of a page's run can be read."
    import nbformat
    from PIL import Image
    readers = {".json": lambda p: json.loads(p.read_text()), ".png": lambda p: Image.open(p).load(), ".npz": lambda p: dict(np.load(p)),
        ".ipynb": lambda p: nbformat.read(p, 4), ".jsonl": lines, ".html": lambda p: must("</html>" in p.read_text(), f"{p} is cut off")}
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith(".") and path.name != "running.ipynb":  # papermill's, while it runs
            readers[path.suffix](path)


def check_left(name, out, known):
    "Nothing half under its own name, and no file beside but those of this library."
    if name == "ledger":
        return must(not out.exists() or all(run in known[0] for run in lines(out)), "a line is wrong")
    if name == "run":
        return check_page(out)
    if out.suffix:
        must(not out.exists() or attack.contents(out) in known, "the file is neither the old nor the new one")
    else:
        check_model(out, known)
    folder = out.parent if out.suffix else out
    odd = {p.name for p in folder.iterdir() if not BESIDE.fullmatch(p.name)} - LEFT[name] - {".lock", "tmp"} if folder.exists() else ()
    must(not odd, f"there is {odd}")
    if out.suffix:
        must(not list((out.parent / "tmp").iterdir()), "counts sorted on the disk stay there")


def again(name, words, out, place):
    "The same command, continuing where there is something to continue."
    resume = ["--resume"] if name in ("fit", "pretrain", "perturb") else []
    if out.suffix == ".h5ad" and out.exists():
        return  # it had ended
    if name == "linear" and out.exists() and any(p.suffix == ".safetensors" for p in out.iterdir()):
        return
    done = call([*words, out, *resume], place, tmp=out.parent / "tmp")
    check_done(done)
    folder = out.parent if out.suffix else out
    beside = [p.name for p in folder.iterdir() if BESIDE.fullmatch(p.name)]
    must(not beside or (out.suffix == ".h5ad" and all(name in done.stderr for name in beside)), f"{beside} stay, and nobody is told")
    must({p.name for p in folder.iterdir()} - {*beside, ".lock"} <= LEFT[name] | {"tmp"}, "something else stays")


# ---- attacks

def kill(name, words, folder, place, known, start=None, **plan):
    "One process: killed, looked at, run again, compared. The known results are old ones and, last, the new one."
    out = target(folder, name)
    if start:
        shutil.copytree(start, out)
    for moment in ("cpu", "wall"):
        for _ in range(6 if moment in plan else 0):  # a process that was faster this time is killed earlier
            done = call([*words, out], place, tmp=folder / "tmp", **plan)
            if done.returncode:
                break
            plan[moment] *= .7
            shutil.rmtree(folder)
            out = target(folder, name)
    if not plan.keys() & {"cpu", "wall"}:
        done = call([*words, out], place, folder=str(folder), tmp=folder / "tmp", **plan)
    must(done.returncode in (-9, -25), f"it was not killed: {done.returncode} {done.stderr[-300:]}")
    check_left(name, out, known)
    again(name, [word for word in words if word != "--resume"], out, place)
    must(result(name, out) == known[-1], "the result is another one")
    shutil.rmtree(folder)


def unbroken(name, words, place, suffix=""):
    "Result and cost of a run that nobody kills."
    folder = place / f"unbroken_{name}{suffix}"
    out = target(folder, name)
    check_done(call([*words, out], place, folder=str(folder), tmp=folder / "tmp", report=str(place / f"cost_{name}")))
    return result(name, out), json.loads((place / f"cost_{name}").read_text()), out


def at_moments(place, names=SIX, n=N):
    "n random moments of each command."
    cases, words_of = {}, attack.commands(place)
    for number, name in enumerate(names):
        known, cost, _ = unbroken(name, words_of[name], place)
        clock = "wall" if name == "run" else "cpu"  # a page waits for its kernel
        moments = np.random.default_rng([18, number]).uniform(.02, 1, n) * cost[clock]
        attack_at = partial(kill, name, words_of[name], place=place, known=[known])
        cases[f"{name}, {n} random moments"] = {f"{name} {i}, at {moment:.3f} s":
            partial(attack_at, place / f"{name}_{i}", **{clock: moment}) for i, moment in enumerate(moments)}
    return cases


def at_changes(place, names=("fit", "linear", "embed", "ledger")):
    "Each write, fsync, rename, link, unlink and mkdir of a command."
    cases, words_of = {}, attack.commands(place, 2)
    for name in names:
        known, cost, _ = unbroken(name, words_of[name], place, "_changes")
        attack_at = partial(kill, name, words_of[name], place=place, known=[known])
        cases[f"{name}, each of {cost['ops']} changes of a folder"] = {f"{name} before change {k}":
            partial(attack_at, place / f"{name}_op{k}", op=k) for k in range(1, cost["ops"] + 1)}
    return cases


def over_a_model(place):
    "The same where a run of two epochs is continued: the old model or the new one."
    old, _, start = unbroken("fit", attack.commands(place, 2)["fit"], place, "_old")
    words = attack.commands(place, 3)["fit"]
    new, _, _ = unbroken("fit", words, place, "_new")
    words = [*words[:-1], "--resume", "-o"]
    (place / "count").mkdir()
    shutil.copytree(start, place / "count/out")
    check_done(call([*words, place / "count/out"], place, folder=str(place / "count"), report=str(place / "count/cost")))
    n = json.loads((place / "count/cost").read_text())["ops"]
    must(weights(place / "count/out") == new, "a run of 2 + 1 epochs is not one of 3")
    return {f"fit --resume over a model, each of {n} changes": {f"resume before change {k}":
        partial(kill, "fit", words, place / f"over_{k}", place, [old, new], start, op=k) for k in range(1, n + 1)}}


def at_bytes(place, names=("fit", "embed"), n=6):
    "When a file grows over so many bytes."
    cases, words_of = {}, attack.commands(place, 2)
    for name in names:
        known, _, out = unbroken(name, words_of[name], place, "_bytes")
        largest = max(p.stat().st_size for p in ([out] if out.suffix else out.iterdir()))
        sizes = np.linspace(0, largest - 1, n).astype(int).tolist()
        cases[f"{name}, at {n} sizes of a file"] = {f"{name} at byte {size}":
            partial(kill, name, words_of[name], place / f"{name}_byte{size}", place, [known], byte=size) for size in sizes}
    return cases


if __name__ == "__main__":
    with attack.arena() as place:
        code = 0
        for cases_of in (at_moments, at_changes, over_a_model, at_bytes):
            code |= report_all("kills", cases_of(place))
        drop_others("kills")
    sys.exit(code)
