"""What the documentation says is there: pages, messages, tests, links, commands. The site itself is built by `make docs`."""
import ast
import json
import re
import shlex
import subprocess
from configparser import ConfigParser
from statistics import mean, stdev

import docsite  # tools/docsite.py
import nbformat
import notebooks  # tools/notebooks.py
import pytest
import typer
import yaml

from scformer_nb import cli

ROOT = notebooks.ROOT
DOCS = sorted(file for file in (ROOT / "docs").rglob("*.md") if file.parent.name not in ("pages", "api"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
per_text = pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.stem)


def settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


# ---- pages

def test_every_notebook_has_its_place():
    listed = [page for found in docsite.sections().values() for page in found]
    assert sorted(listed) == [page for page in notebooks.pages() if page.stem != "index"]
    assert listed[0].stem.endswith("_tour") and list(docsite.sections())[-1] == "Appendix"


def test_readme_lists_the_pages_as_they_are():
    table = notebooks.contents().replace("](", "](nbs/")
    assert table in (ROOT / "README.md").read_text(), "make outputs NB=nbs/index.ipynb, then make readme"


def test_what_a_cell_without_echo_says_is_text():
    out = nbformat.v4.new_output("display_data", {"text/markdown": "[x](y.ipynb)"})
    cell = nbformat.v4.new_code_cell("#| echo: false\nMarkdown(1)", outputs=[out])
    assert [(new.cell_type, new.source) for new in docsite.shown(cell)] == [("markdown", "[x](y.ipynb)")]


def test_links_of_a_page_lead_on_from_the_site():
    cell = nbformat.v4.new_markdown_cell("![x](../figures/x.png) [results](../docs/results.md) [y](y.ipynb)")
    assert docsite.shown(cell)[0].source == "![x](../../figures/x.png) [results](../results.md) [y](y.ipynb)"


def test_readers_see_no_directives_and_no_hidden_cells(tmp_path):
    docsite.write_pages(tmp_path)
    for page in tmp_path.glob("*.ipynb"):
        cells = nbformat.read(page, 4).cells
        assert {cell.cell_type for cell in cells} <= {"code", "markdown"} and not any("#|" in cell.source for cell in cells)
        hidden = [cell.source for cell in nbformat.read(ROOT / "nbs" / page.name, 4).cells if docsite.HIDE.search(cell.source)]
        assert not {notebooks.DIRECTIVE.sub("", source) for source in hidden} & {cell.source for cell in cells}
    toc, home = (tmp_path / "_toc.md").read_text(), (tmp_path / "_home.md").read_text()
    for page in docsite.modules().values():
        assert f"pages/{page.stem}\n" in toc and f"](pages/{page.name})" in home


def test_definitions_get_an_anchor():
    source = "N = 3\ndef f(): pass\n@patch(cls_method=True)\ndef load(cls: Model, x): pass\nclass Model: pass"
    assert list(docsite.definitions(source)) == ["N", "f", "Model.load", "Model"]
    module = notebooks.home_of("ScFormer")
    page = docsite.modules()[module].stem
    assert docsite.source_page("py", dict(module=f"scformer_nb.{module}", fullname="ScFormer.fit")) == f"../pages/{page}.html#ScFormer.fit"


# ---- the API

def a_function(
    x: int,  # (cells,) a number of `adata`, called x_ or *x
    y=2,
) -> str:  # a text
    "One line with `code`."


def test_docments_become_parameters():
    lines = ["One line with `code`."]
    docsite.add_docments(None, "function", "a_function", a_function, {}, lines)
    assert lines == ["One line with ``code``.", "", r":param x: (cells,) a number of ``adata``, called x\_ or \*x", ":returns: a text"]


# ---- messages

def strings(tree):
    "Every text in some code, with … for what is filled in."
    return [docsite.template(node) for node in ast.walk(tree) if isinstance(node, (ast.JoinedStr, ast.BinOp, ast.Constant))]


def test_every_message_in_troubleshooting_exists():
    files = [file.read_text() for file in (ROOT / "scformer_nb").glob("*.py")]
    cells = [cell.source for page in notebooks.pages() for cell in nbformat.read(page, 4).cells if cell.cell_type == "code"]
    known = {text for source in files + cells for text in strings(ast.parse(re.sub(r"^[!%].*", "", source, flags=re.M)))}
    known.add(re.sub(r"\s*\\\n\s*", " ", (ROOT / "Makefile").read_text()))
    headings = re.findall(r"^### `([^`]+)`$", (ROOT / "docs/howto/troubleshooting.md").read_text(), re.M)
    assert len(headings) > 40
    for heading in headings:
        parts = heading.split("…")
        pattern = re.compile(".*".join(map(re.escape, parts)), re.S)
        assert any(pattern.search(text) for text in known if max(parts, key=len) in text), heading


def test_all_messages_are_collected():
    found = list(docsite.messages())
    assert any(name == notebooks.home_of("ScFormer") and "no training data" in text for name, _, text in found)
    assert any(kind == "warning" and "taken as they are" in text for _, kind, text in found)
    assert {name for name, _, _ in found} <= set(docsite.modules())


# ---- peers

def test_fifteen_complaints_are_answered():
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (solved|partly|not) \| (.+?) \| (.+?) \|$", (ROOT / "docs/peers.md").read_text(), re.M)
    assert [int(number) for number, *_ in rows] == list(range(1, 16))
    assert all("#" in issues and len(how) > 20 and re.search(r"::test_|\]\(", shown) for _, issues, _, how, shown in rows)


@per_text
def test_tests_that_are_named_exist(file):
    for name, test in re.findall(r"tests/(\w+\.py)::(\w+)", file.read_text()):
        assert f"def {test}(" in (ROOT / "tests" / name).read_text(), f"{name}::{test}"


def test_nothing_that_has_to_be_compiled_is_required():
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert not {"flash-attn", "flash_attn", "torchtext", "fast-transformers", "pytorch-fast-transformers", "rpy2"} & pinned


def plain(name):
    "A package's name as registries compare it."
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_requirement_is_pinned():
    pinned = {plain(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    wanted = [word for key, value in settings().items() if key.endswith("requirements") for word in value.split()]
    assert [word for word in wanted if plain(re.match(r"[\w.-]+", word)[0]) not in pinned] == []


# ---- links and commands

@per_text
def test_links_between_files_resolve(file):
    for target in re.findall(r"\]\(([^)#\s]+)", file.read_text()):
        if "://" not in target:
            made = ROOT / "nbs" / target.split("pages/")[-1] if "pages/" in target else file.parent / target
            assert made.exists(), target


def test_broken_links_of_a_site_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#here">x</a><a href="b.html#there">y</a><img src="c.png"><a href="https://x.org">z</a>')
    (tmp_path / "b.html").write_text('<p id="here">')
    assert list(docsite.broken_links(tmp_path)) == [("a.html", "b.html#there"), ("a.html", "c.png")]


def command_lines():
    "The lines in the documentation that call the command."
    blocks = [block for file in TEXTS for block in re.findall(r"```sh\n(.*?)```", file.read_text(), re.S)]
    return [line for block in blocks for line in block.splitlines() if line.startswith("scformer ")]


def test_commands_and_options_exist():
    group = typer.main.get_command(cli.app)
    for line in command_lines():
        _, name, *words = shlex.split(line, comments=True)
        assert name in group.commands, line
        options = {option for param in group.commands[name].params for option in param.opts}
        assert {word for word in words if re.match(r"--?[a-z]", word)} <= options, line


def test_five_lines_of_shell():
    assert len(command_lines()) > 8


# ---- results, citation, CI

def test_results_are_those_of_the_ledger():
    text = docsite.unbroken("\n".join(docsite.results()))
    lines = [json.loads(line) for line in (ROOT / "figures/integration.jsonl").read_text().splitlines()]
    for dataset in {line["dataset"] for line in lines}:
        runs = [line for line in lines if (line["dataset"], line["method"]) == (dataset, "scFormer")]
        newest = [line["metrics"]["Overall"] for line in runs if line["settings"] == runs[-1]["settings"]]
        row = next(row for row in text[text.index("| Overall |"):].splitlines() if row.startswith(f"| {dataset} |"))
        spread = f"\u00a0±\u00a0{stdev(newest):.3f}" if len(newest) > 1 else ""
        assert f"{mean(newest):.3f}{spread}" in row
    assert "best of five seeds" in text


def ledger_lines(name):
    return [json.loads(line) for line in (ROOT / f"figures/{name}.jsonl").read_text().splitlines()]


def test_numbers_in_prose_are_those_of_the_ledgers():
    "Those of the models that ship, and the times."
    own_data, peers = ((ROOT / "docs" / name).read_text() for name in ("howto/own_data.md", "peers.md"))
    found = {(x["dataset"], x["method"]): x["metrics"] for x in ledger_lines("new_study") if x["option"] == "all cells"}
    known = {dataset: scores for (dataset, method), scores in found.items() if method == "zero-shot"}
    for dataset, scores in known.items():
        pca = found[dataset, "PCA"]["kNN_accuracy"]
        assert f"{scores['kNN_accuracy']:.3f} against {pca:.3f} ({dataset})" in own_data
    for score, text in (("label_accuracy", "{} to {} of the labels are right"), ("unknown", "{} to {} of the cells are called unknown")):
        values = [scores[score] for scores in known.values()]
        assert text.format(f"{min(values):.0%}", f"{max(values):.0%}") in own_data
    fits = {x["cells"]: x["cpu_seconds"] for x in ledger_lines("atlas") if x["step"] == "fit"}
    times = "{:.0f}, {:.0f} and {:.0f} CPU seconds for 1,000, 10,000 and 100,000".format(*(fits[n] for n in (1000, 10_000, 100_000)))
    assert times in own_data and times in peers


def test_every_tracked_figure_is_shown_or_read():
    shared = "\n".join(notebooks.code(notebooks.modules()["experiment"]))
    sources = {page.stem.split("_exp_")[1]: shared + "\n".join(notebooks.code(page))
        for page in notebooks.pages() if "_exp_" in page.stem}
    texts = "\n".join([file.read_text() for file in TEXTS] + ["\n".join(docsite.results())])
    listed = subprocess.run(["git", "ls-files", "figures"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    files = [ROOT / name for name in listed if (ROOT / name).exists()] or [f for f in (ROOT / "figures").rglob("*") if f.is_file()]
    for file in files:
        path = file.relative_to(ROOT / "figures").as_posix()
        owner = max((e for e in sources if path.removeprefix("umap/").startswith(e)), key=len, default=None)
        kept = path.endswith((".npy", ".npz", ".csv", ".csv.gz")) and owner and path[path.index("."):] in sources[owner]
        assert f"figures/{path}" in texts or kept, f"nothing shows or reads figures/{path}"


def test_citation_and_changelog_have_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == settings()["version"] and f"## {settings()['version']}" in (ROOT / "CHANGELOG.md").read_text()
    page = (ROOT / "docs/citation.md").read_text()
    assert all(reference["doi"] in page for reference in citation["references"])


def test_the_workflow_does_what_ci_does():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    runs = {name: " ".join(step.get("run", "") for step in job["steps"]) for name, job in jobs.items()}
    assert ".ci/run" in runs["test"] and "make docs" in runs["docs"] and jobs["publish"]["needs"] == ["test", "docs"]
