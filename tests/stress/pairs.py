"""Two processes at once, for every pair of commands in one folder or with one output: each does its work or says that
the other is there, and what lies there in the end is whole and the work of one that said it was done."""
import json
import shutil
import sys
from functools import partial
from itertools import combinations_with_replacement

import attack
import numpy as np
from attack import check_done, check_refused, must, report_all, together
from kills import BESIDE, lines, result, target, unbroken
from report import drop_others

MAKERS = ("fit", "pretrain", "perturb", "linear", "run")
# what a command may say of the other
SAID = ("another run is at work", "is not empty", "is there already", "holds a run of the page", "no run of a page made it",
    "no run to continue", "has changed while it was read", "holds no saved model", "holds another kind of model", "holds a saved model")
TRIALS = 2


def kind(out):
    "Which command made what lies there."
    if (out / "run.json").exists():
        return "run"
    facts = json.loads((out / "model.json").read_text())
    if facts.get("kind") == "perturbation":
        return "perturb" if facts["history"] else "linear"
    return "pretrain" if facts["settings"]["studies"] else "fit"


def check_ends(ends):
    "Each end is good or says of the other."
    for done in ends:
        check_done(done) if done.returncode == 0 else check_refused(done, *SAID)
    must(any(done.returncode == 0 for done in ends), f"neither has done its work: {[done.stderr for done in ends]}")


def in_one_folder(names, words_of, known, folder, place, late, start=None):
    "Two that write to one folder."
    out = target(folder, names[0])
    if start:
        shutil.copytree(start, out)
    ends = together([([*words_of[name], out], lag) for name, lag in zip(names, (0, late), strict=True)], place, folder / "gate")
    check_ends(ends)
    good = {name.removesuffix(" --resume") for name, done in zip(names, ends, strict=True) if done.returncode == 0}
    must(kind(out) in good, f"there is the work of {kind(out)}, and {good} said done")
    must(result(kind(out), out) in known[kind(out)], "the result is that of neither")
    must(not [p for p in out.rglob("*") if BESIDE.fullmatch(p.name)], "a half file stays")
    shutil.rmtree(folder)


def while_it_is_read(words, reader, known, results, folder, place, late, start):
    "One writes a model, the other embeds with it or predicts."
    out, file = target(folder, "fit"), folder / "x.h5ad"
    if start:
        shutil.copytree(start, out)
    with_it = [word if word != "MODEL" else out for word in reader]
    ends = together([([*words, out], 0), ([*with_it, file], late)], place, folder / "gate")
    check_ends(ends)
    must(ends[0].returncode == 0, f"who reads has stopped who writes: {ends[0].stderr}")
    must(ends[1].returncode or attack.contents(file) in results, "what was read is of no model")
    must(result("fit", out) == known, "the model is another one")
    shutil.rmtree(folder)


def to_one_file(name, words, known, folder, place, late):
    "Two that write the same new file."
    out = target(folder, name)
    ends = together([([*words, out], lag) for lag in (0, late)], place, folder / "gate")
    check_ends(ends)
    must(sum(done.returncode == 0 for done in ends) == 1, "both say that the file is theirs")
    must(result(name, out) == known and not [p for p in folder.iterdir() if BESIDE.fullmatch(p.name)], "a half file stays")
    shutil.rmtree(folder)


def delays(place, name, seed):
    "How much later the second starts: at once, and some time within a run of the first."
    cost = json.loads((place / f"cost_{name}").read_text())["wall"]
    return [0, *np.random.default_rng([18, seed]).uniform(0, .9 * cost, TRIALS - 1)]


def folders(place):
    "Every pair of makers in a new folder, and a run that is continued by two, or begun anew, or taken by another."
    words_of, cases = attack.commands(place, 2), {}
    known = {name: [unbroken(name, words_of[name], place, "_pairs")[0]] for name in MAKERS}
    start = place / "unbroken_fit_pairs/out"
    more = attack.commands(place, 3)["fit"]
    known["fit"].append(unbroken("fit", more, place, "_more")[0])
    words_of["fit --resume"] = [*more[:-1], "--resume", "-o"]
    for number, names in enumerate(combinations_with_replacement(MAKERS, 2)):
        for i, late in enumerate(delays(place, names[0], number)):
            cases[f"{' and '.join(names)}, {late:.2f} s later"] = partial(
                in_one_folder, names, words_of, known, place / f"pair_{number}_{i}", place, late)
    continued = {}
    for number, other in enumerate(("fit --resume", *MAKERS)):
        for i, late in enumerate(delays(place, "fit", 100 + number)):
            continued[f"fit --resume and {other}, {late:.2f} s later"] = partial(in_one_folder, ("fit --resume", other), words_of,
                known, place / f"more_{number}_{i}", place, late, start)
    return {"two that write, one folder": cases, "a run that is continued, and another, one folder": continued}


def readers(place):
    "Embedding with a model that is trained, or continued, at that moment."
    words = attack.commands(place, 2)["fit"]
    old, _, start = unbroken("fit", words, place, "_read")
    more = [*attack.commands(place, 3)["fit"][:-1], "--resume", "-o"]
    new, _, end = unbroken("fit", attack.commands(place, 3)["fit"], place, "_reread")
    embed, results = ["embed", "MODEL", place / "cells.h5ad", "-o"], []
    for number, model in enumerate((start, end)):
        file = place / f"of_{number}.h5ad"
        check_done(attack.call([*embed[:1], model, *embed[2:], file], place))
        results.append(attack.contents(file))
    cases = {}
    for i, late in enumerate((0, *np.random.default_rng(18).uniform(0, 1.2, 7) * delays_of(place))):
        cases[f"fit --resume and embed, {late:.2f} s later"] = partial(
            while_it_is_read, more, embed, new, results, place / f"read_{i}", place, late, start)
        if i < 2:
            cases[f"fit and embed, {late:.2f} s later"] = partial(
                while_it_is_read, words, embed, old, results, place / f"read_new_{i}", place, late, None)
    return {"one that writes, one that reads": cases}


def delays_of(place):
    return json.loads((place / "cost_fit").read_text())["wall"]


def one_file(place):
    "Two that embed or predict into the same new file."
    words_of, cases = attack.commands(place, 2), {}
    for number, name in enumerate(("embed", "predict")):
        known, _, _ = unbroken(name, words_of[name], place, "_file")
        for i, late in enumerate(delays(place, name, 200 + number)):
            cases[f"{name} twice, {late:.2f} s later"] = partial(
                to_one_file, name, words_of[name], known, place / f"{name}_two_{i}", place, late)
    return {"two that write, one file": cases}


def ledgers(place, n=8, runs=25):
    "Eight processes that add runs to one ledger; and notes of downloads, and arrays, by as many."
    path = place / "shared" / "x.jsonl"
    path.parent.mkdir()

    def add():
        ends = together([(["ledger", path, first * runs, runs], 0) for first in range(n)], place, place / "gate_ledger")
        for done in ends:
            check_done(done)
        must(sorted(seed for seed, _ in lines(path)) == list(range(n * runs)), "lines are lost")
        must(sum(map(bool, path.read_bytes().splitlines())) == n * runs, "lines are broken")  # empty ones are no runs

    def note():
        for number in range(n):
            (place / f"{number}.txt").write_text(str(number))
        (place / "data").mkdir()
        ends = together([(["note", f"{number}.txt"], 0) for number in range(n)], place, place / "gate_note")
        for done in ends:
            check_done(done)
            must(not done.stderr, done.stderr)
        must(len(json.loads((place / "data/known_hashes.json").read_text())) == n, "notes are lost")

    def keep():
        ends = together([(["keep", place / "kept", number], 0) for number in range(n)], place, place / "gate_keep")
        for done in ends:
            check_done(done)
        must(len(np.load(place / "kept/toy_cells.npz").files) == n, "arrays are lost")
    return {f"{n} processes, one ledger": {"runs": add}, f"{n} first downloads, one table of hashes": {"notes": note},
        f"{n} processes, one file of arrays": {"arrays": keep}}


if __name__ == "__main__":
    with attack.arena() as place:
        code = 0
        for cases_of in (folders, readers, one_file, ledgers):
            code |= report_all("pairs", cases_of(place))
        drop_others("pairs")
    sys.exit(code)
