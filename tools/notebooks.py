"""What the notebooks need besides nbdev: README from the index page, the sync check, style and counts, stored outputs."""
import argparse
import ast
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
DIRECTIVE = re.compile(r"^#\s*\|.*\n?", re.M)
EXPORT = re.compile(r"^#\s*\|\s*exporti?s?\b", re.M)
MODULE = re.compile(r"^#\s*\|\s*default_exp\s+(\w+)", re.M)
# the last number of each floor of the house; pages of the appendix are A0, A1, ...
FLOORS = {
    "Foundations": 3, "Model": 8, "Evaluation": 19, "Experiments": 29,
    "Perturbation": 39, "Species": 49, "Shell": 99,
}


def pages():
    "Every notebook in reading order: by number, then the appendix, then the index."
    return sorted((ROOT / "nbs").glob("[!_.]*.ipynb"))


def floor(page):
    "The part of the house that a page belongs to; None for the index and the tour, which belong to all."
    if page.stem == "index" or page.stem.endswith("_tour"):
        return None
    if page.stem.startswith("A"):
        return "Appendix"
    return next(name for name, last in FLOORS.items() if int(page.stem[:2]) <= last)


def title(page):
    "Title and promise of a page, as its first cell says them."
    first = "".join(json.loads(page.read_text(encoding="utf-8"))["cells"][0]["source"])
    return re.match(r"# (.+)\n\n> (.+)", first).groups()


def contents(short=False):
    "The pages as a Markdown table, by floor: a row a page with its promise, or a row a floor."
    listed = {}
    for page in pages():
        if floor(page):
            link = f"[{page.stem.split('_')[0]} {title(page)[0]}]({page.name})"
            listed.setdefault(floor(page), []).append((link, title(page)[1].rstrip(".")))
    if short:
        rows = [f"| {name} | {' · '.join(link for link, _ in found)} |" for name, found in listed.items()]
        return "\n".join(["| floor | pages |", "|---|---|", *rows])
    rows = [row for name, found in listed.items()
        for row in (f"| **{name}** | |", *(f"| {link} | {promise} |" for link, promise in found))]
    return "\n".join(["| page | what it explains |", "|---|---|", *rows])


def code(page):
    "The sources of a page's code cells."
    return list(code_of(page, page.stat().st_mtime_ns))


@cache
def code_of(page, changed):
    "The same of a file as it was when it `changed`; its pictures make it slow to read."
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def exported(page):
    "The cells of a page that go into the package, without their directives."
    return [DIRECTIVE.sub("", source).strip("\n") for source in code(page) if EXPORT.search(source)]


def modules():
    "Exported modules and the notebooks that they come from, in reading order."
    return {name: page for page in pages() for name in MODULE.findall("\n".join(code(page)))}


def directives(cell):
    "The `#|` lines of a cell as a dict, read as nbdev reads them."
    from nbdev.process import extract_directives
    return extract_directives(cell, remove=False) if cell["cell_type"] == "code" else {}


def nbdev(command, cwd=ROOT):
    "Run one of nbdev's commands in `cwd`."
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # nbdev_export does nothing inside nbdev_test
    subprocess.run([BIN / command[0], *command[1:]], cwd=cwd, env=env, check=True, stdin=subprocess.DEVNULL)  # noqa: S603 nbdev's, from a list


@cache
def home_of(name):
    "The module whose page defines a class or a function, methods patched into a class aside; else the name itself."
    found = modules()
    if name in found:
        return name
    defined = re.compile(rf"(?<!patch\n)(?<!patch\(cls_method=True\)\n)^(class|def) {name}\b", re.M)
    return next((module for module, page in found.items() if defined.search("\n".join(exported(page)))), name)


def by_value(source, values):
    "Code that reads variables, with their values written in their place, so that it can be pasted."
    lines = [line.encode() for line in source.splitlines(True)]
    names = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and n.id in values]
    for n in sorted(names, key=lambda n: (n.lineno, n.col_offset), reverse=True):
        line = lines[n.lineno - 1]
        lines[n.lineno - 1] = line[:n.col_offset] + values[n.id].encode() + line[n.end_col_offset:]
    return b"".join(lines).decode()


def shown(cell):
    "A cell with `#| echo: false` as the Markdown that it shows."
    from nbformat.v4 import new_markdown_cell
    return new_markdown_cell("".join("".join(out.get("data", {}).get("text/markdown", "")) for out in cell.outputs))


def render():
    "The README: index.ipynb without hidden cells and directives, parameters by their value, links as seen from the top level."
    import nbformat
    from nbconvert import MarkdownExporter
    nb = nbformat.read(ROOT / "nbs/index.ipynb", 4)
    nb.metadata.language_info = {"name": "python"}
    tagged = "\n".join(cell.source for cell in nb.cells if "parameters" in cell.metadata.get("tags", []))
    values = dict(re.findall(r"^(\w+): \w+ = (.+?)(?:  #.*)?$", tagged, re.M))
    nb.cells = [cell for cell in nb.cells if "hide" not in directives(cell)]
    for cell in nb.cells:
        if cell.cell_type == "code" and "echo:" not in directives(cell):
            cell.source = by_value(DIRECTIVE.sub("", cell.source), values)
            cell.outputs = [out for out in cell.outputs if not any(k.startswith("image/") for k in out.get("data", {}))]
    nb.cells = [shown(cell) if "echo:" in directives(cell) else cell for cell in nb.cells]
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r"\]\((?!\.\./|https?:|#)", "](nbs/", text).replace("](../", "](")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def readme():
    "Write README.md from nbs/index.ipynb."
    (ROOT / "README.md").write_text(render(), encoding="utf-8")


def out_of_sync():
    "Files that cleaning, exporting and rendering would change; found in a temporary copy, the work tree stays as it is."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("nbs", "scformer_nb"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        shutil.copy(ROOT / "settings.ini", copy)
        for module in set(copy.glob("scformer_nb/*.py")) - {copy / "scformer_nb/__init__.py"}:
            module.unlink()  # so that a module which no notebook exports any more shows up as well
        nbdev(["nbdev_clean"], copy)
        nbdev(["nbdev_export"], copy)

        def content(top):
            files = [*top.glob("nbs/[!_.]*.ipynb"), *top.glob("scformer_nb/*.py")]
            return {str(file.relative_to(top)): file.read_text(encoding="utf-8") for file in files}

        ours, fresh = content(ROOT), content(copy)
    ours["README.md"], fresh["README.md"] = (ROOT / "README.md").read_text(encoding="utf-8"), render()
    return sorted(name for name in ours | fresh if ours.get(name) != fresh.get(name))


def check():
    "Fail when a notebook is not clean, package or README are not what the notebooks say, or exported cells break `style`."
    if stale := out_of_sync():
        sys.exit(f"Out of sync: {', '.join(stale)}. Run nbdev_clean, nbdev_export and make readme, then look at the difference.")
    print(f"{len(pages())} notebooks are clean, package and README are in sync.")
    style()


def crowded():
    "Lines of exported cells that hold two statements or a named lambda, or over 100 characters: (page, line)."
    rules = ["--isolated", "--no-cache", "--select", "E501,E701,E702,E731", "--line-length", "100"]
    with tempfile.TemporaryDirectory() as folder:
        for page in modules().values():
            (Path(folder) / f"{page.stem}.py").write_text("\n".join(exported(page)), encoding="utf-8")
        command = [BIN / "ruff", "check", *rules, "--output-format", "json", folder]
        done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 ruff's, from a list
        for found in json.loads(done.stdout):
            lines = Path(found["filename"]).read_text(encoding="utf-8").splitlines()
            yield Path(found["filename"]).stem, lines[found["location"]["row"] - 1].strip()


def style():
    "Fail where exported cells hold two statements on a line, named lambdas or lines over 100 characters."
    if found := [f"{page}: {line}" for page, line in crowded()]:
        sys.exit("\n".join([*found, "One statement a line, no named lambdas, 100 characters at most."]))
    print("Exported cells: one statement a line, no named lambdas, lines of 100 characters at most.")


def definitions(source):
    "Names of constants, functions, classes and methods that a cell defines."
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (method.name for method in node.body if isinstance(method, ast.FunctionDef))
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (name.id for target in targets for name in ast.walk(target)
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store))


def measure(cells):
    "Lines, cells, names and long lines of exported cells; a line counts when it is not blank, docments included."
    lines = [[line for line in cell.splitlines() if line.strip()] for cell in cells]
    names = [name for cell in cells for name in definitions(cell) if not name.startswith("__")]
    private = sum(name.startswith("_") for name in names)
    long = sum(len(line) > 100 for cell in lines for line in cell)
    return {"lines": sum(map(len, lines)), "cells": len(cells), "public": len(names) - private, "private": private, "over 100": long}


def count():
    """Measure the exported code: a line counts when it stands in an exported cell and is not blank, docments
    included, the directive left out. Names are constants, functions, classes and methods, but for Python's own."""
    import pandas as pd
    found = {name: exported(page) for name, page in modules().items()}
    table = pd.DataFrame({name: measure(cells) for name, cells in found.items()}).T
    table.loc["all"] = table.sum()
    print(table.to_string())
    sizes = pd.Series([measure([cell])["lines"] for cells in found.values() for cell in cells])
    print(f"exported cells: median {sizes.median():g} lines, 90% at {sizes.quantile(.9):g} or fewer")


FULL_RUN = "\nfull, out = True, '../figures'"  # an experiment page shows its full run, read from the ledger


def stable(output):
    "The output without what differs from run to run: nothing of stderr, widgets and progress bars."
    if output["output_type"] == "stream":
        lines = "".join(output["text"]).split("\n") if output["name"] == "stdout" else []
        text = "\n".join(line for line in lines if "\r" not in line)
        return {**output, "text": text.splitlines(True)} if text.strip() else None
    return None if "application/vnd.jupyter.widget-view+json" in output.get("data", {}) else output


def execute(page, flags):
    "Run one page as `nbdev_test --flags` does and store what it shows; the cells that are skipped keep what they have."
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell, format_exc
    from nbdev.config import get_config
    nb, shell = read_nb(page), CaptureShell(page)
    skipped = set(get_config(path=ROOT).tst_flags.split()) - set(flags)
    os.chdir(page.parent)
    sys.path.insert(0, str(ROOT))
    for number, cell in enumerate(nb.cells):
        found = directives(cell)
        if cell.cell_type != "code" or skipped & found.keys() or found.get("eval:", [""])[0].lower() == "false":
            continue
        full = FULL_RUN if "_exp_" in page.stem and "parameters" in cell.metadata.get("tags", []) else ""
        outputs = shell.run(DIRECTIVE.sub("", cell.source) + full)
        if shell.exc:
            sys.exit(f"{page.name}, cell {number}:\n\n{cell.source}\n\n{''.join(format_exc(shell.exc))}\nNothing was stored.")
        cell.outputs = [out for out in map(stable, outputs) if out]
    write_nb(nb, page)
    nbdev(["nbdev_clean", "--fname", str(page)])


def outputs(notebooks, flags):
    "Refresh the stored outputs: a fresh process for each page, one thread and fixed hashes, so that two runs agree byte for byte."
    os.environ.update(OMP_NUM_THREADS="1", PYTHONHASHSEED="0")
    for page in [Path(name).resolve() for name in notebooks] or pages():
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(execute, page, flags).result()
        print(f"{page.name}: outputs stored")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("readme", help=readme.__doc__)
    commands.add_parser("check", help=check.__doc__)
    commands.add_parser("style", help=style.__doc__)
    commands.add_parser("count", help=count.__doc__)
    sub = commands.add_parser("outputs", help=outputs.__doc__)
    sub.add_argument("notebooks", nargs="*", metavar="NB", help="notebooks; all of them when none is named")
    sub.add_argument("--flags", default="", help="cells to run that nbdev_test skips, for example data,slow")
    args = parser.parse_args()
    if args.command == "outputs":
        outputs(args.notebooks, args.flags.replace(",", " ").split())
    else:
        {"readme": readme, "check": check, "style": style, "count": count}[args.command]()
