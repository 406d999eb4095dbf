"""The report: one file, nothing in it runs or loads anything, whatever names the data brings."""
import re

import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from bs4.element import Comment
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from scformer_nb import report

HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", '"><svg onload=alert(1)>', "{{ 7 * 7 }}", "{% raw %}",
    "</pre></style></title><script src=//x></script>", "<a href=\"java\tscript:alert(1)\">x</a>", "<iframe srcdoc='<script>1</script>'>",
    "[x](javascript:alert(1))", "<form action=//x><input formaction=javascript:1>", "<div style='background:url(//x)'>",
    "<div style='background:u\\72l(//x)'>", "<!--><script>alert(1)</script>-->", "<base href=//x>",
    "<math><mtext><style><img src=x></style>",
]


def shows(kind, text):
    return new_output("display_data", data={kind: text})


def write(path, cells, **facts):
    "The report of a page of these cells, as a file and as a tree."
    page = new_notebook(cells=[new_markdown_cell(f"# {facts.get('title', 'Page')}\n\n> What it is for"), *cells])
    settings = [dict(name="n", value=facts.get("value", "1"), help="how many", changed=True)]
    file = report.write_report(page, path / "report.html", "scformer run x", [facts.get("data", "cells")], settings, facts.get("notes", ()))
    return file, BeautifulSoup(file.read_text(), "html.parser")


def assert_inert(tree):
    assert not tree(["script", "iframe", "object", "embed", "form", "svg", "link", "base"])
    for tag in tree(True):
        assert not [name for name in tag.attrs if name.startswith("on") or name in ("srcdoc", "formaction", "srcset")], tag
        assert re.match(r"(data:image/|https?:|mailto:|#|$)", tag.get("href", tag.get("src", "#")).strip()), tag
        assert not str(tag.get("src", "")).startswith("http") and "(" not in tag.get("style", ""), tag
    assert not tree(string=lambda text: isinstance(text, Comment))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_stay_text_or_go(text, tmp_path):
    table = pd.DataFrame({text: [text], "note": [text]}, index=[text])
    warning = new_output("stream", name="stderr", text=f"/x.py:1: UserWarning: {text}\n")
    cells = [new_markdown_cell(f"## {text}\n\n{text} $x_1$"), new_code_cell(f"# {text}", metadata={"tags": ["report"]}, outputs=[
        shows("text/html", table.to_html()), shows("text/html", text), shows("text/markdown", text), shows("text/plain", text),
        new_output("stream", name="stdout", text=text), warning, new_output("error", ename="E", evalue=text, traceback=[])])]
    file, tree = write(tmp_path, cells, title=text, value=text, data=text, notes=[text])
    assert_inert(tree)
    assert text in tree.find(class_="data").get_text() and "49" not in tree.h1.get_text()
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_results_come_first_and_once(tmp_path):
    tagged = new_code_cell("a_call()", metadata={"tags": ["report"]}, outputs=[shows("text/plain", "the-number")])
    cells = [new_markdown_cell("## Way\n\nSome prose."), new_code_cell("b_call()", outputs=[shows("text/plain", "a-step")]),
        new_markdown_cell("## Numbers\n\nWhat they mean."), tagged]
    _, tree = write(tmp_path, cells)
    results, steps = tree.find(id="results").get_text(), tree.find(id="steps").get_text()
    assert "the-number" in results and "What they mean." in results and "a-step" not in results
    assert "a-step" in steps and "the-number" not in steps and "Shown under Results" in steps
    assert not tree.find(id="warnings")


def test_warnings_from_before_and_from_within_the_page_are_shown(tmp_path):
    said = new_output("stream", name="stderr", text="/x.py:1: UserWarning: three cells are empty\n")
    _, tree = write(tmp_path, [new_code_cell("1", outputs=[said])], notes=["it takes 9 GB"])
    shown = tree.find(id="warnings").get_text()
    assert "it takes 9 GB" in shown and "three cells are empty" in shown


def test_a_bad_card_is_a_warning_that_says_what_to_try(tmp_path):
    page = new_notebook(cells=[new_code_cell("1")])
    def said(**card):
        file = report.write_report(page, tmp_path / "r.html", "x", [], [], card=card)
        found = BeautifulSoup(file.read_text(), "html.parser").find(id="warnings")
        return [li.get_text() for li in found("li")] if found else []
    depth, few, told = said(depth_R2=.45, participation_ratio=1.4, confounding=.8)
    assert "depth R2 is 0.45" in depth and "counts" in depth and "try a higher weight of kl" in depth
    assert "participation ratio is 1.4" in few and "compare with PCA" in few and "80% of the batch" in told and "batch_key" in told
    assert said(depth_R2=.1, participation_ratio=7.5, confounding=.1) == said(AvgBIO=.7) == said() == []


def test_tables_keep_their_numbers():
    table = pd.DataFrame({"NMI": ["0.50", "0.70"], "note": ["", "a <b> c"]}, index=pd.Index(["PCA", "scFormer"], name="method"))
    tree = BeautifulSoup(report.marked_table(table.to_html()), "html.parser")
    assert [[c.get_text() for c in row(["th", "td"])] for row in tree.tbody("tr")] == [["PCA", "0.50", ""], ["scFormer", "0.70", "a <b> c"]]
    assert tree.find(class_="ours").th.get_text() == "scFormer"
    levels = pd.DataFrame([[1, 2]], columns=pd.MultiIndex.from_tuples([("a", "x"), ("a", "y")]))
    shown = BeautifulSoup(report.marked_table(levels.to_html()), "html.parser")
    assert "".join(c.get_text() for c in shown("th")) == "axy0" and shown.find(colspan="2").get_text() == "a"
    assert report.marked_table("<p>no table</p>") == "<p>no table</p>"


def test_a_table_of_a_styler_keeps_its_values():
    html = pd.DataFrame({"a": [0.5]}, index=["scFormer"]).style.format(precision=3).to_html()
    assert "0.500" in report.marked_table(html) and "<style" not in report.marked_table(html)


def test_every_warning_once_and_none_for_developers():
    text = ("/a/b.py:1: UserWarning: 5 cells\nhave no label\n  warn()\n/a/b.py:1: UserWarning: 5 cells have no label\n  warn()\n"
        "/c.py:3: FutureWarning: soon\n  x()\n100%|####| 3/3\n")
    page = new_notebook(cells=[new_code_cell("", outputs=[new_output("stream", name="stderr", text=text)])])
    assert report.warnings_of(page) == ["5 cells have no label"]


def test_a_page_without_a_title_has_a_report(tmp_path):
    page = new_notebook(cells=[new_code_cell("1")])
    assert report.page_summary(page) == ("Page", "")
    assert nbformat.validate(page) is None and report.write_report(page, tmp_path / "r.html", "x", [], []).exists()
