"""The rules that notebooks, package and README share."""
import ast
import os
import re
import subprocess
from pathlib import Path

import architecture  # tools/architecture.py
import nbformat
import notebooks  # tools/notebooks.py
import pytest

PAGES = notebooks.pages()
HOUSE = ["00_tour", "01b_data", "20_exp_clustering", "52_cli", "A0_io", "A2_simulate", "A5_hub", "index"]
PARAMETER = re.compile(r"[a-z]\w*: \w.* = .+  # \S.*")
MACHINE = re.compile(rf"/tmp/|/home/\w|/root/|/Users/\w|{re.escape(str(notebooks.ROOT))}")  # noqa: S108 looked for, not written
per_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def code_cells(page):
    return [cell for cell in nbformat.read(page, 4).cells if cell.cell_type == "code"]


def test_readme_code_can_be_pasted():
    source = "out = f(out, n=n)  # out and n stay here\nx.n('n')"
    assert notebooks.by_value(source, {"out": '"é"', "n": "1"}) == "out = f(\"é\", n=1)  # out and n stay here\nx.n('n')"
    lines = re.findall(r"^```python\n(.*?)^```", (notebooks.ROOT / "README.md").read_text(), re.M | re.S)
    names = [node for text in lines for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Name, ast.alias))]
    given = {getattr(node, "asname", None) or getattr(node, "name", None) for node in names}
    given |= {node.id for node in names if isinstance(getattr(node, "ctx", None), ast.Store)}
    assert lines and {node.id for node in names if isinstance(node, ast.Name)} <= given, "README uses what it does not import"


def test_imports_are_found_however_they_are_written():
    imported = architecture.imported
    assert imported("from scformer_nb.data import load\nfrom . import binning\nfrom .heads import MGM") == {"data", "binning", "heads"}
    assert imported("import scformer_nb.model\nimport numpy as np\nnp.data") == {"model"}
    home = notebooks.home_of("ScFormer")
    assert home in notebooks.modules()
    assert imported("%matplotlib inline\nimport scformer_nb as scf\nscf.tokens.Vocab; scf.ScFormer") == {"tokens", home}


def test_pages_are_read_in_order():
    assert [page.stem for page in PAGES] == sorted(page.stem for page in PAGES)
    assert PAGES[-1].stem == "index" and len(PAGES) > 25


def test_the_appendix_holds_what_is_below_and_what_is_above():
    pages = [notebooks.ROOT / f"nbs/{name}.ipynb" for name in HOUSE]
    order = sorted(pages, key=architecture.rank)
    assert [page.stem for page in order] == [
        "A0_io", "A2_simulate", "01b_data", "20_exp_clustering", "52_cli", "A5_hub", "00_tour", "index"]
    assert [notebooks.floor(page) for page in pages] == [
        None, "Foundations", "Experiments", "Shell", "Appendix", "Appendix", "Appendix", None]


def test_pages_import_from_lower_numbers_only():
    assert architecture.upward() == []


@per_page
def test_pages_import_modules_that_exist(page):
    assert architecture.imports(page, everything=True) - set(notebooks.modules()) == set()


def test_what_other_imports_bring_along_is_not_drawn():
    assert architecture.direct({"c": {"a", "b"}, "b": {"a"}, "a": set()}) == {"c": {"b"}, "b": {"a"}, "a": set()}


def test_exported_code_is_measured():
    cell = "X = 1\n\nclass _A:\n    def __init__(self): pass\n    def f(self):\n        y = 2" + " " * 100 + "# here"
    assert notebooks.measure([cell]) == {"lines": 5, "cells": 1, "public": 2, "private": 1, "over 100": 1}


def test_the_tour_is_short_and_shows_cells_early():
    cells = nbformat.read(next(page for page in PAGES if page.stem.endswith("_tour")), 4).cells
    words = " ".join(cell.source for cell in cells if cell.cell_type == "markdown").split()
    pictures = [i for i, cell in enumerate(cells) for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(words) <= 900 and pictures[0] < 10
    assert not any(notebooks.EXPORT.search(cell.source) for cell in cells)


@per_page
def test_pages_open_with_a_title_and_a_promise(page):
    notebook = nbformat.read(page, 4)
    nbformat.validate(notebook)
    assert re.match(r"# \S.*\n\n> \S", notebook.cells[0].source)
    assert notebook.metadata.kernelspec.name == "python3"


@per_page
def test_stored_outputs_are_free_of_errors_logs_and_paths(page):
    for cell in code_cells(page):
        for out in cell.outputs:
            assert out.output_type != "error" and out.get("name") != "stderr", cell.source
            texts = [out.get("text", ""), *(text for kind, text in out.get("data", {}).items() if kind.startswith("text/"))]
            assert not MACHINE.search("".join(texts)), cell.source


@pytest.mark.parametrize("page", [page for page in PAGES if "_exp_" in page.stem or page.stem == "index"], ids=lambda page: page.stem)
def test_pages_with_parameters(page):
    cells = code_cells(page)
    assert not any(notebooks.EXPORT.search(cell.source) for cell in cells)
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    lines = [line for line in notebooks.DIRECTIVE.sub("", tagged[0].source).splitlines() if line.strip()]
    assert lines and [line for line in lines if not PARAMETER.fullmatch(line)] == []


def test_stored_outputs_come_out_the_same_twice(tmp_path):
    page = notebooks.ROOT / "nbs/index.ipynb"
    notebook = nbformat.read(page, 4)
    sources = ["import sys; print('kept'); print('gone', file=sys.stderr); {1, 2}", "#| slow\n1 / 0", "print(' 50%', end='\\r'); object()"]
    notebook.cells = [nbformat.v4.new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(sources)]
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="from before")]
    (tmp_path / "settings.ini").write_text((notebooks.ROOT / "settings.ini").read_text())
    copy = tmp_path / "nbs/copy.ipynb"
    copy.parent.mkdir()
    nbformat.write(notebook, copy)
    stored = [notebooks.outputs([copy], []) or copy.read_bytes() for _ in range(2)]
    assert stored[0] == stored[1]
    text = [["".join(out.get("text", out.get("data", {}).get("text/plain", ""))) for out in cell.outputs] for cell in code_cells(copy)]
    assert text == [["kept\n", "{1, 2}"], ["from before"], ["<object>"]]


def test_a_python_that_is_too_old_is_refused(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexec python3 -c \"import sys; sys.version_info = (3, 9, 18, 'final', 0); exec(sys.argv[1])\" \"$2\"\n")
    old.chmod(0o755)
    command = ["make", "env", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    run = subprocess.run(command, cwd=notebooks.ROOT, env=env, capture_output=True, text=True)
    assert run.returncode != 0 and "scformer_nb needs Python 3.11 or newer" in run.stderr and "is 3.9" in run.stderr
    assert not Path(tmp_path / "venv").exists()


def test_the_package_names_its_modules():
    import scformer_nb as scf
    source = Path(scf.__file__).read_text()
    for_editors = source[source.index("from . import ("):source.index(")\n")]
    assert set(scf.__all__) == {*notebooks.modules(), "ScFormer", "load"}
    assert set(re.findall(r"\w+", for_editors)) - {"from", "import"} == set(notebooks.modules())


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, scformer_nb as scf; assert not {'torch', 'scanpy', 'numpy'} & set(sys.modules), 'heavy'; assert 'data' in dir(scf)"
    subprocess.run([notebooks.BIN / "python", "-c", code], check=True)


def test_the_drawing_of_imports_is_of_this_code():
    page = next(page for page in PAGES if page.stem.endswith("_architecture"))
    shown = "".join("".join(out.get("data", {}).get("text/markdown", "")) for cell in code_cells(page) for out in cell.outputs)
    fresh = architecture.listing(architecture.graph())
    assert shown == fresh, f"the figure in {page.name} is old: make outputs NB=nbs/{page.name}"
