"""Every broken or odd input through every entry point that reads it: `python tests/stress/corpus.py [GROUP ...] [--every N]`.

Each group is a table of cases (corpus_files.py, corpus_models.py, corpus_own.py) and the entry points that they go through.
A warm process (tests/warm.py) works the table off with 4 GB of memory above its own; one that hangs for 30 s or dies is
replaced by another, which goes on behind it. What is wrong with an answer: a traceback, an error of a dependency, no error
line or several, one that does not name the file, something left of a failed output, an input accepted that must not be,
or another result than the good file's where it is the same.
"""
import argparse
import contextlib
import importlib
import io
import json
import os
import queue
import resource
import shutil
import sys
import tempfile
import threading
import time
import traceback
import warnings
from dataclasses import replace
from pathlib import Path

HERE = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
sys.path[:0] = HERE
import warm  # noqa: E402
from report import drop_others, record  # noqa: E402

SECONDS, MEMORY = 30, 4 * 2**30


# ---- in the warm process

def prepare():
    "Small recipes and short trainings; a page is checked and not run."
    import typer
    from toy import SMALL

    import scformer_nb as scf
    from scformer_nb.batch_correction import BatchShift

    def would_run(*how):
        raise typer.Exit(0)

    scf.recipe.DEFAULT = replace(scf.recipe.DEFAULT, **SMALL)
    scf.runner.execute, BatchShift.steps = would_run, 50


def limit_memory():
    "4 GB above what the process has."
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def attempt(act, *args):
    "Exit code, stderr and result of the command line, or of the function, that an entry point makes."
    from typer.testing import CliRunner

    from scformer_nb import cli
    words = act(*args)
    if not callable(words):
        done = CliRunner().invoke(cli.app, [str(word) for word in words], env={"COLUMNS": "300", "TERM": "dumb", "CI": "1"})
        if not isinstance(done.exception, SystemExit | None):
            raise done.exception
        return done.exit_code, done.stderr, done.stdout
    said, result, code = io.StringIO(), None, 0
    with contextlib.redirect_stderr(said):
        try:
            with cli.report_errors():
                result = words()
        except cli.typer.Exit as e:
            code = e.exit_code
    return code, said.getvalue(), result


def plain(text):
    "Letters and digits alone; what a terminal obeys as the command writes it out."
    written = "".join(c if c.isprintable() or c.isspace() else repr(c)[1:-1] for c in str(text))
    return "".join(c for c in written if c.isalnum())


def named(path, text):
    "Whether a message says which of the inputs it is about, by name or as the study of its name."
    return plain(path) in plain(text) or plain(Path(path).name) in plain(text) or f"'{Path(path).stem}'" in text


def left(out):
    "What is there of an output, but for the lock of a folder."
    beside = list(out.parent.glob(f".{out.name}.*"))
    return [p.name for p in [*beside, *([out] if out.is_file() else out.glob("*"))] if p.name != ".lock"]


def judge(entry, want, path, good, folder):
    "What is wrong with the answer of an entry point, in words; nothing where all is right."
    out = folder / f"out{entry.suffix}"
    try:
        code, said, printed = attempt(entry.act, path, out)
    except BaseException as e:
        return f"traceback: {type(e).__name__}: {str(e)[:200]}\n" + "".join(traceback.format_exception(e)[-3:])
    lines = [line for line in said.splitlines() if line.strip() and not line.startswith("warning: ")]
    if "Traceback" in said or code not in (0, 1, 2) or "SCFORMER_DEBUG" in said:
        return f"exit code {code}: {said[-600:]}"
    if code:
        if len(lines) != 1 or not lines[0].startswith("error: "):
            return f"{len(lines)} lines instead of an error: {said[-600:]}"
        if want in ("same", "fine"):
            return f"refused: {said[-300:]}"
        about = path if isinstance(path, str | Path) else path[entry.broken]
        if not named(about, lines[0]) and not (entry.also and named(entry.also(folder.parent), lines[0])):
            return f"does not name the file: {lines[0][:300]}"
        return f"something is left: {left(out)}" if left(out) and not entry.keeps else ""
    if want == "fail":
        return f"accepted: {said[-300:]} {str(printed)[:200]}"
    if want == "warn":
        return "" if "warning: " in said and named(path, said) else f"accepted without a warning that names it: {said[-300:]}"
    try:
        result = entry.result(out, printed)
    except Exception as e:
        return "" if entry.copies and not readable(path) else f"the output cannot be read: {type(e).__name__}: {e}"
    return differs(result, good) if want == "same" else not_finite(result)


def readable(path):
    "Whether anndata reads all of an input; a part that a command does not need is copied as it is."
    import anndata
    try:
        anndata.read_h5ad(path)
    except Exception:
        return False
    return True


def not_finite(result):
    "Numbers that no result may have."
    import numpy as np
    bad = [key for key, value in result.items() if isinstance(value, np.ndarray) and not np.isfinite(value).all()]
    return f"{bad} not finite" if bad else ""


def differs(result, good):
    import numpy as np
    for key, value in good.items():
        if isinstance(value, np.ndarray):
            if result[key].shape != value.shape or not np.array_equal(result[key], value, equal_nan=True):
                return f"{key} is not that of the good file"
        elif result[key] != value:
            return f"{key} is {str(result[key])[:200]}, not {str(value)[:200]}"
    return ""


def wanted(want, entry):
    "What must come of a case at an entry point: `any fit:fail`, and the words of corpus_files.py."
    if entry.refuses:
        return "fail"
    first, *special = want.split()
    special = dict(word.split(":") for word in special)
    for name in (entry.name, *entry.kinds):
        if name in special:
            return special[name]
    if first in ("counts", "model", "scores"):
        return "fail" if first in entry.kinds else "any"
    return first


def work(module, groups, folder, first, every):
    "Judge the cases from the first on; a line of JSON before and after each."
    prepare()
    tables = importlib.import_module(module).GROUPS
    limit_memory()
    say = os.fdopen(os.dup(1), "w", buffering=1)
    goods, number, here = {}, -1, Path(folder, f"work{first}")
    some = [(group, name) for group in groups for name in list(tables[group][0])[every // 2::every] or [*tables[group][0]][-1:]]
    for group, name in some:
        (want, make), entries, path = tables[group][0][name], tables[group][1], None
        for entry in entries:
            number += 1
            if number < first:
                continue
            if path is None:
                shutil.rmtree(here, ignore_errors=True)
                here.mkdir()
                path = made(make, entry.good(Path(folder)), here)
            say.write(json.dumps({"begin": number, "case": f"{group}: {name}", "entry": entry.name}) + "\n")
            wish, start = wanted(want, entry), time.perf_counter()
            if isinstance(path, Exception):
                wrong = f"the case cannot be made: {type(path).__name__}: {path}"
            else:
                with tempfile.TemporaryDirectory(dir=folder) as place:
                    wrong = judge(entry, wish, path, entry.expected(Path(folder), goods) if wish == "same" else None, Path(place))
            say.write(json.dumps({"end": number, "wrong": wrong, "seconds": time.perf_counter() - start}) + "\n")


def made(make, good, folder):
    "The input of a case, or why there is none."
    try:
        with warnings.catch_warnings(action="ignore"):
            return make(good, folder)
    except Exception as e:
        return e


# ---- in the process that watches

def watch(groups, folder, every=1, show=True, module="corpus_own"):
    "Case: what was wrong at which entry point; and the seconds of all."
    wrong, number, seconds = {}, 0, {}
    while number is not None:
        number = watch_one(module, groups, folder, number, every, wrong, seconds, show)
    return wrong, sum(seconds.values())


def watch_one(module, groups, folder, first, every, wrong, seconds, show):
    "Follow one process; where the next begins, if one is needed."
    words = [sys.executable, "-c", f"import sys; sys.path[:0] = {HERE!r}; import corpus; "
             f"corpus.work({module!r}, {groups!r}, {str(folder)!r}, {first}, {every})"]
    with open(folder / "stderr", "w") as errors, warm.Popen(words, stdout=warm.subprocess.PIPE, stderr=errors, text=True) as process:
        lines = queue.Queue()
        threading.Thread(target=lambda: [*map(lines.put, process.stdout), lines.put(None)], daemon=True).start()
        current = None
        while True:
            try:
                line = lines.get(timeout=SECONDS if current else 300)
            except queue.Empty:
                process.kill()
                note(current, f"hangs for {SECONDS} s", SECONDS, wrong, seconds, show)
                return current["begin"] + 1
            if line is None:
                break
            told = json.loads(line)
            if "begin" in told:
                current = told
            else:
                note(current, told["wrong"], told["seconds"], wrong, seconds, show)
                current = None
    if current is None and process.returncode == 0:
        return None
    if current is None:
        raise SystemExit(f"{groups}: the process ended with {process.returncode}: {(folder / 'stderr').read_text()[-2000:]}")
    note(current, f"died with {process.returncode}: {(folder / 'stderr').read_text()[-300:]}", 0, wrong, seconds, show)
    return current["begin"] + 1


def note(current, text, spent, wrong, seconds, show):
    wrong.setdefault(current["case"], {})
    seconds[current["case"], current["entry"]] = spent
    if text:
        wrong[current["case"]][current["entry"]] = text
        if show:
            print(f"    {current['case']} -> {current['entry']}: {text}", flush=True)


def main(groups=(), every=1):
    from corpus_own import GROUPS
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for group in groups or GROUPS:
            place = Path(folder, group.replace(" ", "_"))
            place.mkdir()
            start = time.time()
            wrong, _ = watch([group], place, every)
            bad = sum(map(bool, wrong.values()))
            failed += bad
            tries = len(wrong) * len(GROUPS[group][1])
            if every == 1:
                record("corpus", group, len(wrong) - bad, len(wrong), time.time() - start, f"{tries} runs")
            else:
                print(f"{group}: {len(wrong) - bad} of {len(wrong)} in {time.time() - start:.0f} s, {tries} runs")
    if not groups and every == 1:
        drop_others("corpus")
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("groups", nargs="*")
    parser.add_argument("--every", type=int, default=1)
    given = parser.parse_args()
    sys.exit(bool(main(given.groups, given.every)))
