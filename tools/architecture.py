"""Who imports whom, read from the code and drawn, and the drawing of the model. `python tools/architecture.py` makes both."""
import ast
import re
import sys
from collections import Counter, defaultdict
from functools import cache

from notebooks import FLOORS, ROOT, code, exported, floor, home_of, modules, pages  # tools/notebooks.py

# ---- who imports whom

def imported(source):
    "The package's modules that some code uses: `from scformer_nb.x import y`, `from scformer_nb import x`, `scf.x`."
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
    return {home_of(name) for name in names if not name.startswith("__")}


def imports(page, everything=False):
    "Modules that a page needs: its exported cells, or all cells where it exports nothing or `everything` is asked."
    cells = exported(page)
    return imported("\n".join(code(page) if everything or not cells else cells))


@cache
def below(page):
    "Whether a page of the appendix builds on no numbered page, so that all may import it."
    home = modules()
    return not any(home[name].stem[0] != "A" for name in imports(page) if name in home)


def rank(page):
    "The import order: the appendix that builds on no number, the numbers, the rest of the appendix, tour and index."
    if floor(page) is None:
        return 300
    letter = "_abcdefgh".index(page.stem[2]) / 10  # 09b comes after 09, and 09c after 09b
    if page.stem[0] != "A":
        return 100 + int(page.stem[:2]) + letter
    return int(re.match(r"A(\d+)", page.stem)[1]) + letter + (0 if below(page) else 200)


def upward():
    "Imports that break the order: (page, module)."
    order = {name: rank(page) for name, page in modules().items()}
    return [(page.stem, name) for page in pages() for name in sorted(imports(page, everything=True))
        if order.get(name, 0) >= rank(page)]


def graph():
    "For each page of a floor the pages that it imports from."
    home = modules()
    return {page: {home[name] for name in imports(page) if name in home} - {page} for page in pages()
        if floor(page) and (exported(page) or "_exp_" in page.stem)}


def direct(needs):
    "The same without what other imports bring along anyway."
    @cache
    def brought(page):
        return set().union(*({p} | brought(p) for p in needs.get(page, ())))
    return {page: {p for p in used if not any(p in brought(q) for q in used - {p})} for page, used in needs.items()}


def column(page):
    "The floor under which a page is drawn: what all may import lies under the foundations, the rest at the end."
    if floor(page) == "Appendix":
        return "Foundations" if below(page) else "Shell"
    return floor(page)


def listing(needs):
    "The arrows of the figure as a Markdown table."
    rows = [f"| {page.stem} | {', '.join(p.stem for p in sorted(found, key=rank)) or '-'} |"
        for page, found in sorted(direct(needs).items(), key=lambda item: rank(item[0]))]
    return "\n".join(["| page | builds on |", "|---|---|", *rows])


COLORS = ["#4c72b0", "#55a868", "#c98b2b", "#8172b3", "#c44e52", "#2a9d8f", "#7a7a7a"]


def box(ax, x, y, width, height, text, color, **font):
    "A rounded box with a text in its middle."
    from matplotlib.patches import FancyBboxPatch
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=.08", fc="white", ec=color, lw=1.2, zorder=3)
    tint = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=.08", fc=color, alpha=.13, lw=0, zorder=4)
    ax.add_patch(shape)
    ax.add_patch(tint)
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", zorder=5, **{"fontsize": 8.5, **font})


WIDTH, PITCH, HEIGHT = 2.2, 3.0, .62  # of a box, of columns, of a box


def places(needs):
    "Where each page is drawn: columns by floor, in the order of import from top to bottom."
    columns = defaultdict(list)
    for page in sorted(needs, key=rank):
        columns[column(page)].append(page)
    kept = [name for name in FLOORS if name in columns]
    most = max(map(len, columns.values()))
    place = {}
    for x, name in enumerate(kept):
        for y, page in enumerate(columns[name]):
            place[page] = (PITCH * x, -y - (most - len(columns[name])) / 2)
    return kept, place


def route(start, end, place, lanes):
    "Corners of a line between two columns: on its way it crosses other columns between their boxes, each line in a lane."
    points = [start]
    for x in sorted({x for x, _ in place.values() if start[0] < x < end[0] - .1}):
        ys = sorted(y for other, y in place.values() if other == x)
        wanted = start[1] + (end[1] - start[1]) * (x - start[0]) / (end[0] - start[0])
        gap = min([y - (1 - HEIGHT) / 2 for y in ys] + [ys[-1] + HEIGHT + .19], key=lambda g: abs(g - wanted))
        lane = lanes[x, gap] = lanes[x, gap] + 1
        gap += .055 * (lane // 2) * (-1) ** lane
        points += [(x - .05, gap), (x + WIDTH + .05, gap)]
    return [*points, end]


def curve(points):
    "A path through the points: straight across a column, bent between columns."
    from matplotlib.path import Path
    corners, codes = [points[0]], [Path.MOVETO]
    for i, ((x0, y0), (x1, y1)) in enumerate(zip(points, points[1:], strict=False)):
        if i % 2:
            corners.append((x1, y1))
            codes.append(Path.LINETO)
        else:
            middle = (x0 + x1) / 2
            corners += [(middle, y0), (middle, y1), (x1, y1)]
            codes += [Path.CURVE4] * 3
    return Path(corners, codes)


def draw_imports(needs=None):
    "The figure of who imports whom: an arrow leads from a page to the page that builds on it."
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path
    needs = direct(graph() if needs is None else needs)
    kept, place = places(needs)
    color, lanes = dict(zip(FLOORS, COLORS, strict=True)), Counter()
    lowest = min(y for _, y in place.values())
    fig, ax = plt.subplots(figsize=(2 * len(kept), .5 * (1.9 - lowest)), facecolor="white")
    for x, name in enumerate(kept):
        ax.text(PITCH * x + WIDTH / 2, 1.1, name, ha="center", fontweight="bold", fontsize=11, color=color[name])
    for page, (x, y) in place.items():
        box(ax, x, y, WIDTH, HEIGHT, page.stem.replace("_exp_", " ").replace("_", " "), color[column(page)])
        for below in sorted(needs[page], key=rank):
            u, v = place[below]
            middle, target = (u, v + HEIGHT / 2), (x, y + HEIGHT / 2)
            if u != x:
                path = curve(route((u + WIDTH, middle[1]), target, place, lanes))
            elif v - y < 1.1:
                path = Path([(u + WIDTH / 2, v), (x + WIDTH / 2, y + HEIGHT)])
            else:
                side = u - .1 - .09 * (v - y)
                path = Path([middle, (side, v), (side, y + HEIGHT), target], [Path.MOVETO] + [Path.CURVE4] * 3)
            ax.add_patch(FancyArrowPatch(path=path, arrowstyle="-|>,head_length=3.5,head_width=1.8", fc=color[column(below)],
                ec=color[column(below)], lw=1.1, alpha=.8, zorder=2, shrinkA=0, shrinkB=0))
    ax.set(xlim=(-.9, PITCH * len(kept) - .7), ylim=(lowest - .4, 1.6))
    ax.axis("off")
    fig.subplots_adjust(0, 0, 1, 1)
    return fig


# ---- the model

def arrow(ax, start, end, color="#555555", bend=0):
    "An arrow from one point to another."
    from matplotlib.patches import FancyArrowPatch
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>,head_length=4,head_width=2.2", connectionstyle=f"arc3,rad={bend}",
        color=color, lw=1.3, shrinkA=2, shrinkB=2, zorder=6))


def grid(ax, x, y, rows, colors, size=.3):
    "Small squares, one a number: rows of a matrix or a vector."
    from matplotlib.patches import Rectangle
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            face = colors(value) if value is not None else "#333333"
            ax.add_patch(Rectangle((x + j * size, y - i * size), size, size, fc=face, ec="white", lw=1, zorder=4))


ASKS = {
    "nb": "how many molecules\nhas each gene?",
    "kl": "how little need\nz hold for that?",
    "mgm": "a hidden gene's bin,\nfrom its own vector",
    "mvc": "the same,\nfrom the cell alone",
    "zero": "is a hidden gene\nexpressed?",
    "count": "how are hidden\ncounts shared?",
    "ecs": "pull like cells\ntogether",
    "dar": "forget the\nsequencing batch",
}


def draw_model():
    "The way of a cell through scFormer, from counts to embeddings."
    import matplotlib.pyplot as plt

    from scformer_nb.recipe import DEFAULT
    blue, green, violet, orange, grey = "#4c72b0", "#3f8f5b", "#8172b3", "#b9791c", "#555555"
    shade = plt.get_cmap("Blues")
    fig, ax = plt.subplots(figsize=(12, 5.3), facecolor="white")

    def title(x, text, color=grey):
        ax.text(x, 6.15, text, ha="center", fontsize=11.5, fontweight="bold", color=color)

    def note(x, y, text, **font):
        ax.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": 9, "color": "#333333", **font})

    title(.95, "counts")
    counts = [[0, 9, 2, 0, 31], [4, 0, 1, 7, 0], [0, 3, 0, 12, 5]]
    for i, row in enumerate(counts):
        for j, n in enumerate(row):
            note(.3 + .34 * j, 5.2 - .34 * i, n, color="#333333" if n else "#bbbbbb")
    note(.95, 5.6, "genes", fontsize=8.5, color=grey)
    note(-.06, 4.86, "cells", fontsize=8.5, color=grey, rotation=90)
    arrow(ax, (.95, 4.25), (.95, 3.45))
    note(1.6, 3.85, "rank within\neach cell", fontsize=8.5)
    bins = [[0, 2, 1, 0, 3], [2, 0, 1, 3, 0], [0, 1, 0, 3, 2]]
    grid(ax, .2, 3.05, bins, lambda b: shade(.12 + .25 * b))
    note(.95, 2.15, "bins: 0, 1 (low) ... 50 (high)")
    note(.95, 1.7, f"in training {DEFAULT.mask_ratio:.0%} are hidden")
    grid(ax, .2, 1.15, [[0, 2, None, 0, None]], lambda b: shade(.12 + .25 * b))
    note(.95, .65, f"{DEFAULT.max_genes} of the rest are drawn", fontsize=8.5, color=grey)
    arrow(ax, (2, 2.9), (2.75, 2.9))

    title(3.95, "tokens", blue)
    parts = [("gene token", "which gene"), ("value", "its bin"), ("external token", "optional: perturbed?")]
    for i, (name, what) in enumerate(parts):
        y = 4.7 - 1.05 * i
        box(ax, 2.8, y, 2.3, .75, f"{name}\n{what}", blue, fontsize=9.5)
        if i:
            note(3.95, y + .89, "+", fontsize=13, color=blue)
    note(3.95, 1.75, "one vector for each\ngene of the cell, and <cls>\nfor the cell as a whole")
    arrow(ax, (5.15, 3.3), (5.77, 3.3))

    title(6.75, "transformer", green)
    height = .85 * DEFAULT.n_blocks
    box(ax, 5.8, 3.3 - height / 2, 1.9, height + .15, "", green)
    for i in range(DEFAULT.n_blocks):
        box(ax, 5.9, 2.64 + height / 2 - .85 * i, 1.7, .62, f"block {i + 1}", green, fontsize=10.5)
    asked = "<cls>" if DEFAULT.n_blocks == 1 and not DEFAULT.mgm else "each gene"
    note(6.75, 2.75 - height / 2, f"{asked} attends\nto the visible genes\nof its cell")
    arrow(ax, (7.72, 3.4), (8.45, 3.95), green)

    title(9.3, "what it learns", violet)
    box(ax, 8.5, 3.7, 1.6, .75, r"$h_c$", violet, fontsize=12)
    note(9.3, 4.68, f"{DEFAULT.dim} numbers", fontsize=8.5, color=grey)
    arrow(ax, (9.3, 3.65), (9.3, 2.88), violet)
    note(9.36, 3.26, "bottleneck", ha="left", fontsize=8.5, color=grey)
    box(ax, 8.5, 2.1, 1.6, .75, "z", violet, fontsize=12, fontstyle="italic")
    note(9.3, 1.75, f"{DEFAULT.latent} numbers a cell;\nafter training corrected\nfor batches, from $h_c$", fontsize=8.5,
        va="top", color=grey)

    title(12.35, "what training asks", orange)
    on = [name for name in ASKS if DEFAULT.weights[name]]
    for i, name in enumerate(on):
        y = 4.75 - .95 * i
        box(ax, 11.1, y, .9, .62, name, orange, fontsize=10)
        note(12.12, y + .31, ASKS[name], ha="left", fontsize=9)
        arrow(ax, (10.15, 2.48), (11.05, y + .31), "#aaaaaa")
    if "nb" in on:
        note(12.35, 5.65, "also given: batch, molecules of the cell, gene table", fontsize=8.5, color=grey)
    note(12.35, 3.2, "switches, off unless asked for", fontsize=9, fontweight="bold", color=grey)
    for i, name in enumerate(name for name in ASKS if name not in on):
        x, y = 10.6 + 2.05 * (i % 2), 2.4 - .68 * (i // 2)
        box(ax, x, y, .62, .46, name, grey, fontsize=8)
        note(x + .7, y + .23, ASKS[name], ha="left", fontsize=7, color=grey)

    ax.plot([2.8, 14.4], [.55, .55], color="#dddddd", lw=1)
    note(2.8, .1, "what comes out", ha="left", fontsize=10, fontweight="bold", color=violet)
    note(4.8, .1, "z of each cell as  adata.obsm['X_scformer']", ha="left", fontsize=9.5)
    note(9.1, .1, "the gene table (first part of the tokens) as  adata.varm['scformer']", ha="left", fontsize=9.5)
    ax.set(xlim=(-.2, 14.75), ylim=(-.2, 6.5))
    ax.axis("off")
    fig.subplots_adjust(0, 0, 1, 1)
    return fig


if __name__ == "__main__":
    for path, draw in {"figures/architecture.png": draw_model, "out/imports.png": draw_imports}.items():
        (ROOT / path).parent.mkdir(exist_ok=True)
        draw().savefig(ROOT / path, dpi=130, metadata={"Software": None})
        print(path)
    if broken := upward():
        sys.exit("\n".join(f"{page} imports {name}, which comes later" for page, name in broken))
