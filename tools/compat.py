"""Install the package as it allows, and try it: on each Python with the tested versions, and with the oldest versions of all it names.

Usage: python tools/compat.py [3.11] [3.12] [3.13] [oldest]; without words all of them. Each has a new environment in build/compat.
"""
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = "test_io test_counts test_tokens test_binning test_ledger test_trees test_h5ad test_model_files test_old".split()


def lower_bounds():
    "settings.ini's requirements, each in the oldest version that it allows."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    names = config["DEFAULT"]["requirements"].split()
    return [re.sub(r"^([\w-]+)>=([\d.]+).*", r"\1==\2", name) for name in names]


def install(kind, folder):
    "An environment with the package; the Python in it."
    constraints = ROOT / "constraints.txt"
    if kind == "oldest":
        constraints = folder.with_suffix(".txt")
        constraints.write_text("\n".join(lower_bounds()) + "\n")
    program = shutil.which("python3.11" if kind == "oldest" else f"python{kind}")
    if program is None:
        return None
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([program, "-m", "venv", folder], check=True)  # noqa: S603 a Python of this machine
    python = folder / "bin/python"
    words = [python, "-m", "pip", "install", "-qq", "--no-compile", "-c", constraints, "-e", ROOT, "pytest", "hypothesis"]
    subprocess.run(words, check=True)  # noqa: S603 pip of that environment
    return python


def attempt(kind):
    "Import, demo and tests of one kind; whether all went well, None where there is no such Python."
    folder = ROOT / "build/compat" / kind
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (python := install(kind, folder)) is None:
        return None
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    tests = [f"tests/{name}.py" for name in TESTS]
    commands = (["-c", "import scformer_nb as scf; [getattr(scf, name) for name in scf.__all__]"],
        ["-c", "from scformer_nb.cli import app; app()", "demo", "-o", folder / "demo"], ["-m", "pytest", "-q", "-m", "not slow", *tests])
    codes = [subprocess.run([python, *words], cwd=ROOT, env=env).returncode for words in commands]  # noqa: S603 that Python
    return not any(codes)


if __name__ == "__main__":
    results = {kind: attempt(kind) for kind in sys.argv[1:] or ("3.11", "3.12", "3.13", "oldest")}
    for kind, well in results.items():
        print(f"{kind:8}{ {True: 'passed', False: 'FAILED', None: 'there is no such Python'}[well] }")
    sys.exit(False in results.values())
