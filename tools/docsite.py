"""What the docs site is made of besides its own pages: the notebooks, the docments, the ledgers and the error messages."""
import ast
import re
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pandas as pd
from notebooks import DIRECTIVE, EXPORT, ROOT, exported, floor, home_of, modules, pages, title  # tools/notebooks.py

DOCS = ROOT / "docs"
HIDE = re.compile(r"^#\s*\|\s*hide\b", re.M)
NO_ECHO = re.compile(r"^#\s*\|\s*echo:\s*false\b", re.M)


# ---- the notebooks as pages

def definitions(source):
    "Names that a cell defines, a method patched into a class with the name of its class before it."
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            patched = any("patch" in ast.unparse(d) for d in node.decorator_list)
            yield f"{ast.unparse(node.args.args[0].annotation)}.{node.name}" if patched else node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def unbroken(text):
    "A number and its standard deviation stay on one line."
    return text.replace(" ± ", "\u00a0±\u00a0")


def shown(cell):
    """The cells that readers see instead of this one: no directives, hidden and raw cells; an anchor before each
    definition; what a cell without echo says, as text."""
    from nbformat.v4 import new_markdown_cell
    if cell.cell_type == "markdown":
        cell.source = cell.source.replace("](../figures/", "](../../figures/").replace("](../docs/", "](../")
        cell.source = cell.source.replace("[nbs](../nbs)", "`nbs/`")
        return [cell]
    source = DIRECTIVE.sub("", cell.source)
    if cell.cell_type == "raw" or HIDE.search(cell.source) or not source.strip():
        return []
    if NO_ECHO.search(cell.source):
        return [new_markdown_cell("".join(out.get("data", {}).get("text/markdown", ""))) for out in cell.outputs]
    anchors = [f'<span id="{name}"></span>' for name in definitions(source)] if EXPORT.search(cell.source) else []
    cell.source = source
    for data in [out["data"] for out in cell.outputs if "text/html" in out.get("data", {})]:
        data["text/html"] = unbroken(data["text/html"])
    return [new_markdown_cell("".join(anchors))] * bool(anchors) + [cell]


def sections():
    "The notebooks by chapter of the site, each in reading order: the tour, the floors of the house, the appendix."
    found = {"Start here": [page for page in pages() if page.stem.endswith("_tour")]}
    for page in pages():
        if floor(page):
            found.setdefault(floor(page), []).append(page)
    return found


def seen_from_docs(name):
    "A file of the top level with its links as the site sees them."
    text = (ROOT / name).read_text(encoding="utf-8").replace("[nbs](nbs)", "`nbs/`")
    text = re.sub(r"\]\((figures/|LICENSE|CITATION)", r"](../\1", text)
    for name in ("CONTRIBUTING", "SECURITY"):
        text = text.replace(f"]({name}.md)", f"]({name.lower()}.md)")
    return unbroken(re.sub(r"\]\(docs/", "](", re.sub(r"\]\(nbs/", "](pages/", text)))


def write_pages(folder):
    "The notebooks as readers see them, with the outputs that are stored, and the README as the site's first page."
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*"):
        old.unlink()
    trees = []
    for chapter, found in sections().items():
        trees += ["```{toctree}", ":hidden:", f":caption: {chapter}", "", *(f"pages/{page.stem}" for page in found), "```", ""]
        for page in found:
            nb = nbformat.read(page, 4)
            nb.cells = [new for cell in nb.cells for new in shown(cell)]
            nbformat.write(nb, folder / page.name)
    (folder / "_toc.md").write_text("\n".join(trees), encoding="utf-8")
    (folder / "_home.md").write_text(seen_from_docs("README.md"), encoding="utf-8")
    (folder / "_contributing.md").write_text(seen_from_docs("CONTRIBUTING.md"), encoding="utf-8")


# ---- the API: autodoc over the exported modules, parameters from docments

def write_api(folder):
    "One page per exported module; the command gets the help of its commands."
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.md"):
        old.unlink()
    for name, page in modules().items():
        if name == "cli":
            text = commands()
        else:
            text = f"```{{eval-rst}}\n.. automodule:: scformer_nb.{name}\n   :members:\n   :member-order: bysource\n```\n"
        title = "The scformer command" if name == "cli" else f"scformer_nb.{name}"
        head = f"# {title}\n\nExplained in [{page.stem}](../pages/{page.name}).\n\n"
        (folder / f"{page.stem[:2]}_{name}.md").write_text(head + text, encoding="utf-8")


def commands():
    "`--help` of every command, as text that is as wide as a page."
    import typer
    from typer.testing import CliRunner
    app, runner = import_module("scformer_nb.cli").app, CliRunner(env={"COLUMNS": "92", "TERM": "dumb", "NO_COLOR": "1"})

    def help_of(command, path):
        yield path, runner.invoke(app, [*path, "--help"], prog_name="scformer").output
        for name, below in sorted(getattr(command, "commands", {}).items()):
            yield from help_of(below, [*path, name])

    texts = help_of(typer.main.get_command(app), [])
    return "\n".join(f"## {' '.join(['scformer', *path])}\n\n```text\n{text.strip()}\n```\n" for path, text in texts)


def rst(text):
    "A plain sentence with Markdown's code marks, as reStructuredText."
    parts = re.split(r"(?<!`)`([^`]+)`(?!`)", str(text))
    return "".join(f"``{part}``" if i % 2 else re.sub(r"([*|\\]|\w_\b)", lambda m: m[1][:-1] + "\\" + m[1][-1], part)
        for i, part in enumerate(parts))


def add_docments(app, what, name, obj, options, lines):
    "For autodoc: the comments beside the parameters become their documentation."
    from fastcore.docments import docments
    lines[:] = [rst(line) for line in lines]
    if what not in ("class", "function", "method"):
        return
    try:
        found = docments(obj, full=True)
    except (TypeError, OSError, AttributeError, ValueError):
        return
    said = {name: rst(" ".join(str(info.docment).split())) for name, info in found.items() if info.get("docment")}
    returned = said.pop("return", None)
    lines += ["", *(f":param {name}: {text}" for name, text in said.items() if name != "self")]
    lines += [f":returns: {returned}"] if returned and what != "class" else []


def source_page(domain, info):
    "For linkcode: the cell of the notebook that defines a name."
    module = info["module"].removeprefix("scformer_nb.")
    page = modules().get(module)
    if not page or domain != "py":
        return None
    known = {name for source in exported(page) for name in definitions(source)}
    name = info["fullname"] if info["fullname"] in known else info["fullname"].split(".")[0]
    return f"../pages/{page.stem}.html" + (f"#{name}" if name in known else "")


# ---- error messages, from the raise statements

def template(node):
    "The text of a message, with … for what is filled in."
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return re.sub("…+", "…", "".join(template(part) for part in node.values))
    return template(node.left) + template(node.right) if isinstance(node, ast.BinOp) else "…"


def messages():
    "What the package raises, warns of and prints to stderr: (module, kind, text) in the order of the code."
    for name in modules():
        tree = ast.parse((ROOT / f"scformer_nb/{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            call = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Expr) else None
            if not (isinstance(call, ast.Call) and call.args):
                continue
            kind = ast.unparse(call.func).split(".")[-1]
            printed = kind == "echo" and any(k.arg == "err" for k in call.keywords)
            text = template(call.args[0])
            if (isinstance(node, ast.Raise) or kind == "warn" or printed) and re.search(r"\w{3}", text):
                yield name, "warning" if kind == "warn" else "printed" if printed else kind, text


def message_tables():
    "All messages as Markdown, a table per module."
    found = list(messages())
    parts = []
    for name in dict.fromkeys(name for name, _, _ in found):
        plain = [(kind, text.replace("|", "\\|").replace("<", "&lt;").replace("`", "")) for n, kind, text in found if n == name]
        rows = [f"| {kind} | {text} |" for kind, text in plain]
        parts += [f"### scformer_nb.{name}", "", "| kind | message |", "|---|---|", *rows, ""]
    return "\n".join(parts)


# ---- results, from the ledgers

# of other experiments: the first four
SCORES = {"clustering": ["AvgBIO"], "integration": ["AvgBIO", "AvgBATCH", "Overall"], "ablation": ["Overall"],
    "what_is_kept": ["depth_R2", "participation_ratio", "CiLISI", "kNN_accuracy"],
    "perturbation": ["corr_delta_de", "corr_specific", "discrimination"], "gene_embeddings": ["same type, all genes", "shared GO term"],
    "cross_species": ["mouse level 1", "mouse level 2", "human to mouse", "mouse to human", "counterparts"]}
NO_SCORES = {"seed", "seconds", "resolution", "n_seeds"}
NOW_CALLED = {"method": {"start": "linear init"}, "option": {"w/o warm start": "w/o SVD init"}}  # in the ledgers: shown


def markdown(table, corner):
    "A table of text as Markdown."
    rows = [[corner, *table.columns], ["---"] * (1 + len(table.columns)), *([row.name, *row] for _, row in table.iterrows())]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows) + "\n"


def best_in_bold(mean, sd=None):
    "Rows of means as text, ± the standard deviation where there is one, the highest mean of a row in bold."
    def text(row):
        shown = row.map("{:.3f}".format).where(row.notna(), "")
        if sd is not None:
            shown += sd.loc[row.name].map(" ± {:.3f}".format).where(sd.loc[row.name].notna() & row.notna(), "")
        return shown.where(row != row.drop("ceiling", errors="ignore").max(), "**" + shown + "**")
    return mean.apply(text, axis=1)


def finished_runs(experiment):
    "Mean and standard deviation of the newest settings of each run in the ledger; empty without a ledger."
    path = ROOT / f"figures/{experiment}.jsonl"
    if not path.exists():
        return pd.DataFrame()
    ledger = import_module(f"scformer_nb.{home_of('Ledger')}").Ledger
    runs = ledger(path).summary().replace(NOW_CALLED)
    return runs.drop_duplicates(["dataset", "method", "option"], keep="last")


def our_tables(experiment, runs):
    "A table per score: data sets by methods, or options by data sets where a method has several."
    numbers = [c for c in runs.select_dtypes("number") if not c.endswith("_sd") and c not in NO_SCORES]
    for score in [s for s in SCORES.get(experiment, []) if s in runs] or numbers[:4]:
        runs_of = runs[runs[score].notna()]
        if runs["option"].nunique() > 1:
            for method, found in runs_of.groupby("method", sort=False):
                options = list(found["option"].unique())
                mean, sd = (found.pivot(index="dataset", columns="option", values=v)[options] for v in (score, f"{score}_sd"))
                yield markdown(best_in_bold(mean, sd).T, f"{score}, {method}")
            continue
        methods = sorted(runs_of["method"].unique(), key=lambda m: ("scFormer", "ceiling").index(m) if m in ("scFormer", "ceiling") else -1)
        mean, sd = (runs_of.pivot(index="dataset", columns="method", values=v)[methods] for v in (score, f"{score}_sd"))
        seeds = runs_of[runs_of["method"] == "scFormer"].set_index("dataset")["n_seeds"].reindex(mean.index).fillna(0).astype(int)
        yield markdown(best_in_bold(mean, sd).assign(seeds=seeds), score)


def paper_table(page):
    "The table `paper` of an experiment page, data sets by methods for each score; None where the page has none."
    for cell in nbformat.read(page, 4).cells:
        if cell.cell_type == "code" and cell.source.startswith("paper = pd.DataFrame("):
            names = {"pd": pd}
            exec(ast.unparse(ast.parse(cell.source).body[0]), names)  # noqa: S102 a table of a page of ours
            table = names["paper"]
            if table.columns.nlevels == 1:
                return {"AvgBIO": table.T}
            return {score: table.xs(score, axis=1, level=1).T for score in table.columns.levels[1]}
    return None


def won(mean):
    "In how many rows scFormer is highest."
    known = mean[mean["scFormer"].notna()]
    return f"{int((known.idxmax(axis=1) == 'scFormer').sum())} of {len(known)}"


def beside_the_paper(page, runs):
    "What the paper reports, and for how many data sets its claim that scFormer is best holds there and here."
    for score, theirs in (paper_table(page) or {}).items():
        yield f"The paper's {score} on its own data, the best of five seeds:\n"
        yield markdown(best_in_bold(theirs), score)
        if score in runs and "scFormer" in set(runs["method"]):
            ours = runs.pivot(index="dataset", columns="method", values=score)
            yield (f"scFormer has the highest {score} in {won(theirs)} data sets of the paper, and the highest mean in {won(ours)} "
                   "data sets here, those counted that it has finished.\n")


def drawn(experiment):
    "The tracked figures of an experiment: first that of all data sets, then those of each."
    folder = ROOT / "figures"
    return sorted(file for file in folder.rglob("*.png") if str(file.relative_to(folder)).startswith(experiment))


def results():
    "Every experiment: what its ledger holds, beside what the paper reports, and its figures."
    for page in pages():
        if "_exp_" in page.stem:
            experiment, runs = page.stem.split("_exp_")[1], finished_runs(page.stem.split("_exp_")[1])
            heading, promise = title(page)
            yield f"## {heading}\n\n{promise}\n\nPage: [{page.stem}](pages/{page.name})."
            if runs.empty:
                yield f"No full run is in the ledger `figures/{experiment}.jsonl` yet; `make experiments` fills it.\n"
            else:
                yield f"Ledger: [{experiment}.jsonl](../figures/{experiment}.jsonl).\n"
                yield from our_tables(experiment, runs)
            yield from beside_the_paper(page, runs)
            for file in drawn(experiment):
                name = file.stem.removeprefix(experiment).replace("_", " ").strip() or "all data sets"
                yield f"*{name}*\n\n![{heading}: {name}](../{file.relative_to(ROOT).as_posix()})\n"


# ---- everything, and the links of what came out

def prepare():
    "Write all that the site includes, before Sphinx looks for its sources."
    write_pages(DOCS / "pages")
    write_api(DOCS / "api")
    (DOCS / "pages/_messages.md").write_text(message_tables(), encoding="utf-8")
    (DOCS / "pages/_results.md").write_text(unbroken("\n".join(results())), encoding="utf-8")


class Links(HTMLParser):
    "The targets and the anchors of an HTML page."
    def __init__(self, text):
        super().__init__()
        self.links, self.anchors = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links |= {attrs[k] for k in ("href", "src") if attrs.get(k)} if tag != "link" else set()
        self.anchors |= {attrs[k] for k in ("id", "name") if attrs.get(k)}


def broken_links(site):
    "Links within a built site that lead nowhere: (page, link)."
    found = {file: Links(file.read_text(encoding="utf-8")) for file in sorted(site.rglob("*.html"))}
    for file, page in found.items():
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            lost = not target.exists() or (parts.fragment and target in found and unquote(parts.fragment) not in found[target].anchors)
            if lost:
                yield str(file.relative_to(site)), link


if __name__ == "__main__":
    lost = list(broken_links(Path(sys.argv[1]).resolve()))
    sys.exit("\n".join(f"{page}: {link} leads nowhere" for page, link in lost) if lost else 0)
