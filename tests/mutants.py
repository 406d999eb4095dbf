"""Seeded faults (mutants.toml), one at a time in a copy of the repository: does a test or a page notice? `make mutants`.

A fault goes into the module and into the cell that it is exported from: a page that ran its own cells as they are would
test its module by the code of the page. Tests and pages run in processes forked from one that has imported what the
package imports, but not the package. What notices a fault must pass without it, which is tried at the end.
"""
import argparse
import compileall
import gc
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests/stress")]
import notebooks  # noqa: E402
from report import record  # noqa: E402

TABLE = ROOT / "tests/mutants.toml"
WARM = """torch anndata sklearn.neighbors matplotlib.pyplot fastcore.basics h5py tqdm.auto safetensors.torch typer.testing
    pytest""".split()  # what every test imports, by way of conftest.py
LIMIT = 120  # seconds of a core that a file of tests, or a page, may take; ten times as many on the clock


def mutants():
    "Name: module, old, new, tests."
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))


# ---- a fault in a copy

def replaced(text, name, fault, where):
    "The text with the fault in it. Raises ValueError where the code does not stand in it exactly once."
    if (n := text.count(fault["old"])) != 1:
        raise ValueError(f"{name}: its old code stands {n} times in {where}, and must once; correct {TABLE.name}")
    return text.replace(fault["old"], fault["new"])


def mutated(name, fault, root=ROOT):
    "The two files of a copy that have the fault, module and page, and what they hold then. Raises ValueError."
    module, page = root / f"scformer_nb/{fault['module']}.py", root / "nbs" / notebooks.modules()[fault["module"]].name
    nb = json.loads(page.read_text(encoding="utf-8"))
    cells = [c for c in nb["cells"] if c["cell_type"] == "code" and notebooks.EXPORT.search("".join(c["source"]))]
    there = [c for c in cells if fault["old"] in "".join(c["source"])]
    if len(there) != 1:
        raise ValueError(f"{name}: its old code stands in {len(there)} cells of {page.name}, and must in one; correct {TABLE.name}")
    source = replaced("".join(there[0]["source"]), name, fault, page.name)
    there[0]["source"] = source.splitlines(True)
    return {module: replaced(module.read_text(encoding="utf-8"), name, fault, module.name), page: json.dumps(nb)}


@contextmanager
def in_place(files):
    "While this is open, the files hold something else."
    before = {path: path.read_bytes() for path in files}
    try:
        for path, text in files.items():
            path.write_text(text, encoding="utf-8")
        yield
    finally:
        for path, data in before.items():
            path.write_bytes(data)


@contextmanager
def copy():
    "A copy of all that tests and pages read, which is where we are while this is open."
    with tempfile.TemporaryDirectory(prefix="mutants_") as folder:
        for path in ROOT.iterdir():
            if path.is_file():
                shutil.copy(path, folder)
            elif path.name in ("scformer_nb", "nbs", "tests", "tools", "docs", "figures"):
                shutil.copytree(path, Path(folder, path.name), ignore=shutil.ignore_patterns("__pycache__", ".*"))
        by_hash = dict(quiet=2, invalidation_mode=compileall.py_compile.PycInvalidationMode.CHECKED_HASH)
        compileall.compile_dir(Path(folder, "scformer_nb"), **by_hash)  # a time stamp could be that of the file before
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(ROOT)


# ---- a test in a process

def warm():
    "Import what costs seconds."
    for name in WARM:
        try:
            importlib.import_module(name)
        except ImportError:
            print(f"{name} is not installed: what needs it is skipped")
    assert "scformer_nb" not in sys.modules
    gc.freeze()


class Failures:
    "A plugin of pytest that keeps the names of failed tests."
    def __init__(self):
        self.names = []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.names.append(report.nodeid.removeprefix("tests/"))


def run_tests(names, first=True):
    "The tests of files and names that fail, or the first; an error where none could run."
    import pytest
    seen = Failures()
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist"] + ["-x"] * first
    code = pytest.main([*options, *(f"tests/{name}" for name in names)], plugins=[seen])
    if code not in (0, 1):
        raise RuntimeError(f"pytest ended with {code}")
    return seen.names


def run_page(name):
    "A page that fails as `nbdev_test` runs it."
    from nbdev.test import test_nb
    data = ["data"] if os.environ.get("SCFORMER_DATA_DIR") else []
    passed, _ = test_nb(Path("nbs", f"{name}.ipynb").resolve(), ["slow", "gpu", "data"], data, basepath=Path.cwd())
    return [] if passed else [name]


def forked(function, *args, limit=LIMIT):
    "What a function returns in a process of its own, and the end of what it printed. Raises RuntimeError."
    folder = Path(tempfile.mkdtemp(prefix="mutant_"))
    if not (pid := os.fork()):
        try:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ |= {"PYTHONPATH": os.getcwd(), "TMPDIR": str(folder)}
            tempfile.tempdir = None
            sys.path[:] = [os.getcwd(), *(path for path in sys.path if not path.startswith(str(ROOT)) or "site-packages" in path)]
            sys.dont_write_bytecode = True
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
            import scformer_nb
            assert scformer_nb.__file__.startswith(os.getcwd()), scformer_nb.__file__
            (folder / "found").write_text(json.dumps(function(*args)))
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(0)
    end, ended = time.monotonic() + 10 * limit, False
    try:
        while not (ended := os.waitpid(pid, os.WNOHANG)[0]) and time.monotonic() < end:
            time.sleep(.2)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # and what it has started
        if not ended:
            os.waitpid(pid, 0)
    try:
        said = (folder / "log").read_text(errors="replace")[-3000:]
        if not (folder / "found").exists():
            raise RuntimeError(f"{args} has no verdict:\n{said}")
        return json.loads((folder / "found").read_text()), said
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- verdicts

def targets(fault):
    "What is tried, in order: tests by name, their files, pages, and the module's own page."
    tests = [name for name in fault["tests"] if ".py" in name]
    files = [name.split("::")[0] for name in tests]
    pages = [name for name in fault["tests"] if ".py" not in name]
    return list(dict.fromkeys([*tests, *pages, *files, notebooks.modules()[fault["module"]].stem]))


def try_one(name):
    "What fails: a test file or page if it is given this."
    return forked(run_tests, [name]) if ".py" in name else forked(run_page, name)


def spent():
    "Seconds of a core that tests and pages have taken so far."
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def who_notices(name, fault, root, verbose=False):
    "The first test or page that fails with the fault; None where all pass."
    with in_place(mutated(name, fault, root)):
        for target in targets(fault):
            try:
                found, said = try_one(target)
            except RuntimeError as error:
                print(error)
                continue
            if found:
                if verbose:
                    print(said)
                return found[0]


def fail_anyway(names):
    "Those of some tests and pages that fail in the copy as it is."
    tests = [name for name in names if ".py" in name]
    failed = forked(run_tests, tests, False, limit=1200)[0] if tests else []
    return set(failed).union(*(forked(run_page, name)[0] for name in names if ".py" not in name))


def main(names, verbose=False):
    chosen = {name: mutants()[name] for name in names or mutants()}
    verdicts, seconds = {}, {}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with copy() as root:
        warm()
        try:
            for name, fault in chosen.items():
                start = spent()
                verdicts[name] = who_notices(name, fault, root, verbose)
                seconds[name] = spent() - start
                print(f"{'caught by ' + verdicts[name] if verdicts[name] else 'SURVIVES'}: {name} ({seconds[name]:.0f} s)", flush=True)
        except KeyboardInterrupt:
            print(f"stopped at {name}: the others before it count")
        start = spent()
        bad = fail_anyway(sorted(filter(None, set(verdicts.values()))))
        print(f"what caught them passes without them ({spent() - start:.0f} s)" if not bad else f"fails without a fault: {bad}")
    caught = {name: by for name, by in verdicts.items() if by and by not in bad}
    modules = defaultdict(list)
    for name, fault in mutants().items():
        modules[fault["module"]].append(name)
    for module, all_of in modules.items():
        if seconds.keys() >= set(all_of):
            note = "; ".join(f"{name}: {caught.get(name, 'survives')}" for name in all_of)
            record("mutants", module, sum(name in caught for name in all_of), len(all_of), sum(seconds[name] for name in all_of), note)
    left = ", ".join(name for name in seconds if name not in caught) or "none"
    print(f"{len(caught)} of {len(seconds)} caught in {sum(seconds.values()):.0f} s; survivors: {left}")
    return len(caught) < .95 * len(chosen)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="mutants; all of them when none is named")
    parser.add_argument("-v", "--verbose", action="store_true", help="show what a failing test says")
    args = parser.parse_args()
    if unknown := set(args.names) - mutants().keys():
        sys.exit(f"{TABLE.name} has no {', '.join(sorted(unknown))}")
    sys.exit(main(args.names, args.verbose))
