"""The rules that notebooks, package and README share."""
import ast
import os
import re
import subprocess
from pathlib import Path

import nbformat
import notebooks  # tools/notebooks.py
import pytest

PAGES = notebooks.pages()
EXPORT = re.compile(r"^#\s*\|\s*(export|default_exp)", re.M)
PARAMETER = re.compile(r"[a-z]\w*: \w.* = .+  # \S.*")
MACHINE = re.compile(rf"/tmp/|/home/\w|/root/|/Users/\w|{re.escape(str(notebooks.ROOT))}")
per_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def code_cells(page):
    return [cell for cell in nbformat.read(page, 4).cells if cell.cell_type == "code"]


def number(page):
    "The reading order; of the appendix all but the hub come first; the index is last, it may import everything."
    early = page.stem.startswith("A") and page.stem != "A3_hub"
    return -10 + int(page.stem[1]) if early else int(page.stem[:2]) if page.stem[:2].isdigit() else 100


def module(page):
    "The module that a page exports, if any."
    found = re.search(r"^#\s*\|\s*default_exp\s+(\w+)", "\n".join(cell.source for cell in code_cells(page)), re.M)
    return found and found[1]


def imported(source):
    "Names of the package's modules that some code uses: `from scformer_nb.x import y`, `from scformer_nb import x`, `scf.x`."
    tree = ast.parse(re.sub(r"^(\s*)[!%].*$", r"\1pass", source, flags=re.M))
    names, aliases = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            parent = "scformer_nb" if node.level else ""
            path = ".".join(filter(None, [parent, node.module])).split(".")
            if path[0] == "scformer_nb":
                names |= {path[1]} if len(path) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                path = alias.name.split(".")
                if path[0] == "scformer_nb":
                    names |= set(path[1:2])
                    aliases.add(alias.asname or path[0])
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            names.add(node.attr)
    return {"scformer" if name == "ScFormer" else name for name in names}


def test_nothing_is_out_of_sync():
    assert notebooks.out_of_sync() == []


def test_readme_code_can_be_pasted():
    source = "out = f(out, n=n)  # out and n stay here\nx.n('n')"
    assert notebooks.by_value(source, {"out": '"é"', "n": "1"}) == "out = f(\"é\", n=1)  # out and n stay here\nx.n('n')"


def test_imports_are_found_however_they_are_written():
    assert imported("from scformer_nb.data import load\nfrom . import binning\nfrom .heads import MGM") == {"data", "binning", "heads"}
    assert imported("%matplotlib inline\nimport scformer_nb as scf\nscf.tokens.Vocab; scf.ScFormer") == {"tokens", "scformer"}
    assert imported("import scformer_nb.model\nimport numpy as np\nnp.data") == {"model"}


@per_page
def test_pages_import_from_lower_numbers_only(page):
    order = {module(other): number(other) for other in PAGES if module(other)}
    used = imported("\n".join(cell.source for cell in code_cells(page)))
    assert {name for name in used if order.get(name, -100) >= number(page)} == set()


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
    assert not any(EXPORT.search(cell.source) for cell in cells)
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


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, scformer_nb as scf; assert not {'torch', 'scanpy', 'numpy'} & set(sys.modules), 'heavy'; assert 'data' in dir(scf)"
    subprocess.run([notebooks.BIN / "python", "-c", code], check=True)
