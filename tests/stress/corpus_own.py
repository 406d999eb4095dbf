"""A hundred other inputs: several files, stores, checkpoints, run folders, parameters, notebooks, ledgers, gene sets, trees,
pairs of genes, perturbation models, models that ship, notes of hashes. And the table of all groups.

Wants are those of corpus_files.py; warn: accepted, with a warning that names the file; fine: accepted.
"""
import gzip
import json
import os
import shutil
import struct

import anndata
import numpy as np
import pandas as pd
import safetensors.torch as st
import torch
import zarr
from corpus_files import FILES, good_cells, on_bytes, on_hdf5
from corpus_models import FACTS, GONE, MODELS, fact, file, header, instead, tensor, text
from entries import COUNTS, FILE_ENTRIES, KEYS, MODEL_ENTRIES, Entry, base, cells, embedding, model, once, screen, second, weights

DEVICES = {"a pipe": os.mkfifo, "a device": lambda path: path.symlink_to("/dev/zero"), "a folder": os.mkdir,
           "a link to nothing": lambda path: path.symlink_to("/nowhere/x")}


def written(name, content):
    "A file of text or bytes, or what a function makes of its path."
    def make(good, folder):
        path = folder / name
        if callable(content):
            content(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path
    return make


def rows(name, table, want="fail"):
    "Cases of one file name: what must come of each, and its content."
    return {case: (want, written(name, content)) for case, content in table.items()}


# ---- Zarr stores

def store(change, name="case.zarr"):
    def make(good, folder):
        path = folder / name
        anndata.read_h5ad(good).write_zarr(path)
        change(path)
        return path
    return make


def zipped(path):
    shutil.make_archive(str(path), "zip", path)
    shutil.rmtree(path)
    os.rename(f"{path}.zip", path)


def attributes(path, **change):
    group = zarr.open_group(str(path), mode="a")
    group.attrs.update(change)


def garble(path):
    for chunk in [p for p in (path / "X/data").rglob("*") if p.is_file() and "zarr" not in p.name and not p.name.startswith(".")]:
        chunk.write_bytes(b"garbage")


def metadata(path):
    return next(p for p in (path / "X/data").iterdir() if p.name in ("zarr.json", ".zarray"))


def bomb(path):
    facts = json.loads(metadata(path).read_text())
    metadata(path).write_text(json.dumps(facts | {"shape": [10**12]}))


ZARR = {
    "a zip": ("fail", store(zipped)),
    "no metadata": ("fail", store(lambda p: [q.unlink() for q in p.glob("*z*") if q.is_file()] + [q.unlink() for q in p.glob(".z*")])),
    "chunks of garbage": ("fail", store(garble)),
    "no chunks": ("fail", store(lambda p: shutil.rmtree(p / "X/data"))),
    "10^12 values": ("fail", store(bomb)),
    "metadata is a pipe": ("fail", store(lambda p: (metadata(p).unlink(), os.mkfifo(p / "X/data/zarr.json")))),
    "an empty folder": ("fail", written("case.zarr", os.mkdir)),
    "a file": ("fail", written("case.zarr", "text")),
}


# ---- several studies

def beside(change, order=1):
    "The good file and another, made of it."
    def make(good, folder):
        adata = good_cells()
        changed = change(adata)
        adata = adata if changed is None else changed
        adata.write_h5ad(folder / "case.h5ad")
        return [good, folder / "case.h5ad"][::order]
    return make


def beside_file(make):
    return lambda good, folder: [good, make(good, folder)]


def rename(adata, change):
    adata.var_names = [change(name) for name in adata.var_names]


STUDIES = {
    "the same file twice": ("fail", lambda good, folder: [good, good]),
    "two files of one name": ("fail", beside_file(lambda good, folder: shutil.copy(good, folder / "cells.h5ad"))),
    "no gene in common": ("fail", beside(lambda a: rename(a, lambda g: f"other{g}"))),
    "genes by Ensembl id": ("fail", beside(lambda a: rename(a, lambda g: f"ENSG{int(g[5:]):011}"))),
    "genes in capitals": ("fail", beside(lambda a: rename(a, str.upper))),
    "the other logged": ("fail", beside(lambda a: setattr(a, "X", a.X.log1p()))),
    "the other empty": ("fail", beside(lambda a: a[:0].copy())),
    "one gene in common": ("any", beside(lambda a: rename(a, lambda g: g if g == "gene_3" else f"other{g}"))),
    "the other of one cell": ("any", beside(lambda a: a[:1].copy())),
    "the other a pipe": ("fail", beside_file(written("case.h5ad", os.mkfifo))),
    "the other cut off": ("fail", beside_file(on_bytes(lambda data: data[:5000]))),
    "the other's indices damaged": ("fail", beside_file(FILES["indices far out"][1])),
    "no batch column": ("fail", beside(lambda a: a.obs.__delitem__("batch"))),
}
STUDY_ENTRIES = [Entry("fit", lambda p, out: ["fit", *p, "-o", out, "--epochs", 1, *KEYS], cells, "", weights, COUNTS, broken=1,
                       also=cells)]


# ---- checkpoints: a run of one epoch that is continued

@once
def run_folder(place):
    import scformer_nb as scf
    made = scf.ScFormer(good_cells(), "batch", n_hvg=1200, recipe=scf.recipe.DEFAULT)
    made.fit(1, place / "run", progress=False, accelerator="cpu")


def checkpoint(change, name="last.ckpt"):
    def make(good, folder):
        shutil.copytree(good / "run", folder / "case")
        change(folder / "case" / name)
        return folder / "case"
    return make


def state(change):
    def to(path):
        found = torch.load(path, weights_only=True)
        torch.save(change(found) or found, path)
    return checkpoint(to)


def put_instead(put, name="last.ckpt"):
    return checkpoint(lambda path: (path.unlink(missing_ok=True), put(path)), name)


CHECKPOINTS = {
    "nothing done": ("fine", checkpoint(lambda path: None)),
    "cut off": ("fail", checkpoint(lambda path: path.write_bytes(path.read_bytes()[:2000]))),
    "a pickle": ("fail", checkpoint(lambda path: path.write_bytes(b"\x80\x02cos\nsystem\nX\x10\x00\x00\x00touch ./sprung.c\x85R."))),
    "a list": ("fail", state(lambda s: [1])),
    "no optimiser": ("fail", state(lambda s: s.pop("optimiser") and None)),
    "weights of another shape": ("fail", state(lambda s: s["network"].update({k: w[:1] for k, w in s["network"].items() if w.ndim}))),
    "weights of NaN": ("fail", state(lambda s: s["network"].update(
        {k: w * float("nan") for k, w in s["network"].items() if w.is_floating_point()}))),
    "a step of text": ("fail", state(lambda s: s.update(step="x"))),
    "rows of text": ("fail", state(lambda s: s.update(rows="x"))),
    "an optimiser of text": ("fail", state(lambda s: s.update(optimiser="x"))),
    "moments in a list": ("fail", state(lambda s: s["optimiser"]["state"][0].update(exp_avg=[s["optimiser"]["state"][0]["exp_avg"]] * 2))),
    "moments of another shape": ("fail", state(lambda s: s["optimiser"]["state"][0].update(exp_avg_sq=torch.zeros(3)))),
    "three betas": ("fine", state(lambda s: s["optimiser"]["param_groups"][0].update(betas=(.9, .99, .9)))),  # those of the recipe count
    "best is text": ("fail", state(lambda s: s.update(best="x"))),
    "the best score is text": ("fail", state(lambda s: s["best"].update(score="x"))),
    "no best score": ("fail", state(lambda s: s["best"].pop("score") and None)),
    "no best weights": ("fail", state(lambda s: s["best"].pop("weights") and None)),
    **{f"last.ckpt is {name}": ("fail", put_instead(put)) for name, put in DEVICES.items()},
    "the lock is a pipe": ("any", put_instead(os.mkfifo, ".lock")),
    "the lock is a folder": ("any", put_instead(os.mkdir, ".lock")),
    "the history is a pipe": ("any", put_instead(os.mkfifo, "history.csv")),
}
CHECKPOINT_ENTRIES = [Entry("fit --resume", lambda p, out: ["fit", cells(base(out)), "-o", p, "--resume", "--epochs", 2, *KEYS],
                            run_folder, keeps=True)]


# ---- folders of `run`

def page_folder(**files):
    def make(good, folder):
        (folder / "case").mkdir()
        for name, content in files.items():
            written(name.replace("__", "."), content)(good, folder / "case")
        return folder / "case"
    return make


RUN_JSON = json.dumps({"page": "clustering", "parameters": {"dataset": "x"}})
PAGES = {
    "run.json is no JSON": ("fail", page_folder(run__json="{]")),
    "run.json is a list": ("fail", page_folder(run__json="[1]")),
    "run.json without end": ("fail", page_folder(run__json="[" * 200_000)),
    "run.json of another page": ("fail", page_folder(run__json=json.dumps({"page": ["x"], "parameters": {}}))),
    "parameters are text": ("fail", page_folder(run__json=json.dumps({"page": "clustering", "parameters": "x"}))),
    "run.json is a pipe": ("fail", page_folder(run__json=os.mkfifo)),
    "run.json is a device": ("fail", page_folder(run__json=DEVICES["a device"])),
    "metrics.json is a folder": ("any", page_folder(run__json=RUN_JSON, metrics__json=os.mkdir)),
    "work is a file": ("any", page_folder(run__json=RUN_JSON, work="text")),
}
PAGE_ENTRIES = [Entry("run", lambda p, out: ["run", "clustering", cells(base(out)), "-o", p], cells, keeps=True)]


# ---- parameters

def typed(text):
    return lambda good, folder: text


PARAMETERS = {text[:40]: (want, typed(text)) for text, want in {
    "n_hvg=": "fail", "n_hvg=1e9": "fail", "n_hvg=-1": "fail", "n_hvg=0x10": "any", "seeds=[0, 0]": "fail", "seeds=[[0]]": "fail",
    "methods=['PCA', 'x']": "fail", "methods=" + "[" * 5000: "fail", "n_hvg=" + "9" * 6000: "fail", "n_hvg=" + "(" * 5000: "fail",
    "label_key=\x00": "fail", "label_key=\ud800": "fail", "layer=__import__('os').system('touch sprung.p')": "fail",
    "full=True": "fail",
    "layer=\u202ex": "fail", "max_epochs=True": "fail", "evil=1": "fail", "=1": "fail", "methods": "fail", "methods=''": "fail",
    "label_key=cell_type\nout='/tmp'": "fail"}.items()}
PARAMETER_ENTRIES = [Entry("run -p", lambda p, out: ["run", "clustering", cells(base(out)), "-p", p, "-o", out], cells,
                           also=cells)]


# ---- executed notebooks, which become reports

def report(path, out):
    import nbformat

    from scformer_nb.report import write_report
    nb = nbformat.from_dict(json.loads(path.read_text()))
    return lambda: write_report(nb, out, "scformer run", ["cells"], [])


def notebook(*outputs, head="# A page\n\n> of a test", **metadata):
    tags = {"tags": ["report"]}
    cell = dict(cell_type="code", id="b", source="1", metadata=tags, outputs=list(outputs), execution_count=1)
    first = dict(cell_type="markdown", id="a", source=head, metadata={})
    return json.dumps(dict(cells=[first, cell], metadata=metadata, nbformat=4, nbformat_minor=5))


def shown(**data):
    return dict(output_type="display_data", data={k.replace("__", "/").replace("_xml", "+xml"): v for k, v in data.items()}, metadata={})


def said(text):
    return dict(output_type="stream", name="stderr", text=text)


SCRIPT = "<script>alert(1)</script>"
NOTEBOOKS = rows("case.ipynb", {
    "no outputs": notebook(),
    "a script as HTML": notebook(shown(text__html=SCRIPT)),
    "a script as SVG": notebook(shown(image__svg_xml=f"<svg onload='alert(1)'>{SCRIPT}</svg>")),
    "HTML of 20,000 levels": notebook(shown(text__html="<div>" * 20_000)),
    "a heading without end": notebook(head="# " + "x" * 1_000_000),
    "brackets without end": notebook(head="# A\n\n" + "[" * 3000 + "*" * 3000),
    "a picture that is none": notebook(shown(image__png="garbage")),
    "a thousand warnings": notebook(said("x.py:1: UserWarning: " + "a b " * 20_000 + "\n" + "y.py:2: UserWarning: c\n" * 1000)),
    "no text at all": notebook(head=""),
}, "fine")
NOTEBOOK_ENTRIES = [Entry("report", report, cells, ".html", lambda out, printed: {"script": "alert(1)" not in out.read_text() or 1 / 0})]


# ---- ledgers

LINE = {"experiment": "case", "dataset": "d", "method": "m", "option": "o", "seed": 0, "settings": {}, "metrics": {"NMI": .5},
        "seconds": 1.0, "versions": {}}


def ledger(path, out):
    from scformer_nb.ledger import Ledger
    found = Ledger(path)
    return lambda: (found.table(), found.summary(), found.get_or_run("d", "m", "o", 0, {}, lambda: {"NMI": .5}))


def line(**change):
    return json.dumps(LINE) + "\n" + json.dumps(LINE | change) + "\n"


LEDGERS = rows("case.jsonl", {
    "cut off": line()[:-9], "bytes": line().encode() + b"\xff\xfe\n", "a list": line() + "[1]\n", "a number": line() + "5\n",
    "brackets without end": line() + "[" * 200_000 + "\n", "6,000 digits": line() + '{"seed": ' + "9" * 6000 + "}\n",
    "seed is text": line(seed="x"), "seed is true": line(seed=True), "metrics are text": line(metrics={"NMI": "x"}),
    "metrics are a list": line(metrics=[1]), "settings are text": line(settings="x"), "seconds are text": line(seconds="x"),
    "no dataset": line(dataset=None), "zeros": line().encode() + bytes(5000)}, "warn") | rows("case.jsonl", {
    "empty": "", "blank lines": "\n\n" + line() + "\n\n"}, "fine") | rows("case.jsonl", {
    "a metric of 10^400": line().replace(".5", "1e400"), "a metric of 10^400, whole": line(metrics={"NMI": 10**400}),
    "a seed of 10^400": line(seed=10**400), "half a character": line(dataset="\ud800"),
    "a metric called seed": line(metrics={"seed": 5}), "a recipe of text": line(settings={"recipe": "x"}),
    "a recipe of lists": line(settings={"recipe": {"dim": [1], "genes": {}}}), "settings without end": line(settings=json.loads(
        '{"a":' * 500 + "1" + "}" * 500))}, "any") | rows("case.jsonl", DEVICES)
LEDGER_ENTRIES = [Entry("ledger", ledger, cells)]


# ---- gene sets

SETS = "first\tof a test\tgene_1\tgene_2\tgene_3\nsecond\t\tgene_3\tgene_4\n"
GMT = rows("case.gmt", {"empty": "", "no genes": "first\tof a test\n", "no tabs": SETS.replace("\t", " "),
                        "bytes": b"\xff\xfe" + SETS.encode(),
                        "zeros": bytes(5000), "gzip": gzip.compress(SETS.encode()), "other genes": "a\tb\tx\ty\tz\n",
                        **DEVICES}) | rows("case.gmt", {
    "a set twice": SETS + SETS, "a set of 100,000 genes": SETS + "big\t\t" + "\t".join(f"g{i}" for i in range(100_000)),
    "a name of 1 MB": "x" * 10**6 + SETS, "CRLF": SETS.replace("\n", "\r\n"), "BOM": b"\xef\xbb\xbf" + SETS.encode(),
    "a gene of signs": SETS + "signs\t\t\u2028\t<b>\tgene_1\n"}, "any")
GMT_ENTRIES = [Entry("perturb", lambda p, out: ["perturb", "fit", cells(base(out)), "--gene-sets", p, "-o", out], cells, "",
                     weights, also=cells)]


# ---- trees of types

def tree(path, out):
    from scformer_nb.io import about_file
    from scformer_nb.trees import read_tree, reference_tree

    def act():
        with about_file(path):
            return reference_tree(read_tree(path))
    return act


def nested(n):
    return '{"a":' * n + '["x","y","z"]' + "}" * n


TREES = rows("case.json", {"JSON cut off": '{"a": {"b": ["x"', "a number": "5", "null": "null", "text": '"x"', "a list": '["x", "y"]',
                           "numbers as types": '{"a": [1, [2]]}',
                           "null as a type": '{"a": null}', "a type twice": '{"a": ["x"], "b": ["x"]}',
                           "empty": "", "no type": "{}", "no UTF-8": b'{"a": ["\xff"]}', "JSON of 200,000 levels": nested(200_000),
                           "JSON of 500 levels": nested(500), **DEVICES}) | rows("case.json", {
    "two types": '{"a": ["x", "y"]}', "BOM": b"\xef\xbb\xbf" + b'{"a": ["x", "y"], "b": ["z"]}'}, "any") | {
    **rows("case.nwk", {"a bracket open": "((a,b),c", "a bracket closes": "(a,b)),c);", "no leaves": "();", "quotes open": "('a,b),c);",
                        "binary": bytes(range(256)) * 20,
                        "one type": "((a));", "a .nwk pipe": os.mkfifo}),
    **rows("case.nwk", {"100,000 brackets": "(" * 100_000 + "a,b" + ")" * 100_000 + ";"}),
    **rows("case.csv", {"one column": "type\nx\ny\n", "ragged": "type,a\nx,A\ny,B,C,D\n", "empty cell": "type,a\nx,A\ny,\nz,B\n",
                        "no rows": "type,a,b\n", "CSV of no UTF-8": b"type,a\n\xff,A\n", "CSV of zeros": bytes(5000),
                        "two parents": "type,a,b\nx,A,C\ny,B,C\nz,B,D\n"}),
}
TREE_ENTRIES = [Entry("read_tree", tree, cells)]


# ---- pairs of genes: a column of var

def pairs(path, out):
    import scformer_nb as scf
    species = {"one": scf.load(path), "two": scf.load(second(base(out)))}

    def act():
        scf.gene_anchors.named_pairs(species)
        found = scf.cross_species.shared_genes(species)
        return found if found is None else scf.cross_species.shared_components(found, 5)
    return act


def orthologs(values):
    def make(good, folder):
        adata = good_cells()
        adata.var["ortholog"] = values(list(adata.var_names))
        adata.write_h5ad(folder / "case.h5ad")
        return folder / "case.h5ad"
    return make


PAIRS = {name: ("any", orthologs(values)) for name, values in {
    "none": lambda v: [""] * len(v), "missing": lambda v: pd.Categorical([None, *v[1:]]), "all of one name": lambda v: ["x"] * len(v),
    "numbers": lambda v: np.arange(len(v)), "NaN": lambda v: np.full(len(v), np.nan), "true": lambda v: np.ones(len(v), bool),
    "the other way round": lambda v: v[::-1]}.items()}
PAIR_ENTRIES = [Entry("pairs", pairs, cells)]


# ---- perturbation models

PERTURBATION = {
    **{f"no {k}": ("fail", fact(k, GONE)) for k in ("settings", "recipe", "genes", "names", "specials", "history", "kind")},
    **{f"{k} is {v!r}": ("fail", fact(k, v)) for k, v in [
        ("settings.n_genes", 10**9), ("settings.n_genes", 0), ("settings.direction", "sideways"), ("settings.n_bins", 1),
        ("settings.gain", {"a": None}), ("settings.seed", -1), ("recipe.dim", 10**9), ("recipe.n_blocks", 10**6), ("recipe.evil", 1),
        ("names", ["a gene that is not there"]), ("genes", ["x"])]},
    "names twice": ("fail", fact("names", lambda v: [v[0]] * len(v))),
    "names without control": ("any", fact("names", lambda v: v[::-1])),
    "noise of 0": ("fail", tensor(lambda w: w * 0, "effects.noise")),
    "noise of NaN": ("fail", tensor(lambda w: w * float("nan"), "effects.noise")),
    "columns far out": ("fail", tensor(lambda w: w + 10**6, "effects.column")),
    "indices far out": ("fail", tensor(lambda w: w + 10**6, "inputs.indices")),
    "indptr falls": ("fail", tensor(lambda w: w.flip(0), "inputs.indptr")),
    "a shape of 2^40": ("fail", tensor(lambda w: w * 0 + 2**40, "inputs.shape")),
    "a negative shape": ("fail", tensor(lambda w: -w, "alike.shape")),
    "no cells": ("fail", tensor(lambda w: w[:1] * 0, "inputs.indptr")),
    "weights beyond all numbers": ("fail", tensor(lambda w: w * 0 + 1e30, "network.encoder.blocks.0.norm2.bias")),
    "level of another length": ("fail", tensor(lambda w: w[:1], "effects.level")),
    "level is 2D": ("fail", tensor(lambda w: w[None], "effects.level")),
    "a scalar": ("fail", tensor(lambda w: w[0], "inputs.indptr")),
    "JSON [[[[": ("fail", text(lambda facts: b"[" * 200_000)),
    "weights cut off": ("fail", file(lambda b: b[:len(b) // 2])),
    "an unknown type": ("fail", header(lambda h: h["control"].update(dtype="EVIL"))),
    "a pipe": ("fail", instead(os.mkfifo)),
}
PERTURBATION_ENTRIES = [Entry("perturb predict", lambda p, out: ["perturb", "predict", p, "gene_1", "gene_1+gene_3", "-o", out], screen,
                              ".csv", lambda out, printed: {"change": pd.read_csv(out, index_col=0).to_numpy(float)})]


# ---- models that ship, with their labelled cells

@once
def shipped_folder(place):
    from scformer_nb.scformer import ScFormer
    from scformer_nb.shipped import Labelled, write_labelled
    folder = place / "shipped"
    shutil.copytree(model(place.parent), folder)
    Z = ScFormer.load(folder).embed_cells(good_cells())
    write_labelled(folder, Labelled(Z, good_cells().obs["cell_type"].to_numpy(str), np.array(["a", "b"] * 40)))


def shipped(folder):
    return shipped_folder(folder) / "shipped"


REFERENCE = "reference.safetensors"


def reference(change):
    "Labelled cells, and what is said about them, are others."
    def to(data):
        n, = struct.unpack("<Q", data[:8])
        about, found = json.loads(json.loads(data[8:8 + n])["__metadata__"]["about"]), st.load(data)
        change(found, about)
        return st.save({k: w.contiguous() for k, w in found.items()}, {"about": json.dumps(about)})
    return file(to, REFERENCE)


SHIPPED = {
    "nothing done": ("fine", reference(lambda t, about: None)),
    "codes beyond": ("fail", reference(lambda t, about: t.update(labels=t["labels"] + 100))),
    "labels are numbers": ("fail", reference(lambda t, about: about.update(labels=[1, 2, 3]))),
    "labels are lists": ("fail", reference(lambda t, about: about.update(labels=[[1], [2, 3], "x"]))),
    "labels are one text": ("fail", reference(lambda t, about: about.update(labels="xyz"))),
    "no labels": ("fail", reference(lambda t, about: about.pop("labels"))),
    "about is a list": ("fail", file(lambda b: st.save(st.load(b), {"about": "[1]"}), REFERENCE)),
    "about without end": ("fail", file(lambda b: st.save(st.load(b), {"about": "[" * 200_000}), REFERENCE)),
    "cells of NaN": ("fail", reference(lambda t, about: t.update(embedding=t["embedding"] * float("nan")))),
    "codes are floats": ("fail", reference(lambda t, about: t.update(labels=t["labels"].float()))),
    "codes below 0": ("fail", reference(lambda t, about: t.update(labels=t["labels"].to(torch.int8) - 1))),
    "cells in bfloat16": ("any", reference(lambda t, about: t.update(embedding=t["embedding"].bfloat16()))),
    "fewer cells": ("fail", reference(lambda t, about: t.update(embedding=t["embedding"][:5]))),
    "of another model": ("fail", reference(lambda t, about: about.update({FACTS: "0" * 64}))),
    "cut off": ("fail", file(lambda b: b[:len(b) // 2], REFERENCE)),
    **{name: ("fail", instead(put, REFERENCE)) for name, put in DEVICES.items()},
}
SHIPPED_ENTRIES = [Entry("embed --labels", lambda p, out: ["embed", p, cells(base(out)), "--labels", "-o", out], shipped, ".h5ad",
                         embedding)]


# ---- notes of hashes beside downloaded files

def fetch(path, out):
    from unittest import mock

    from scformer_nb import datasets

    def act():
        with mock.patch.dict(os.environ, SCFORMER_DATA_DIR=str(path)):
            return datasets.fetch("adamson.zip")
    return act


def noted(content):
    def make(good, folder):
        (folder / "adamson.zip").write_bytes(b"of a test")
        written("known_hashes.json", content)(good, folder)
        return folder
    return make


HASHES = {**{name: ("warn", noted(content)) for name, content in {
    "a list": "[1]", "cut off": '{"adamson.zip": ', "numbers": '{"adamson.zip": 5}', "brackets": "[" * 200_000, "no UTF-8": b'"\xff"',
    "a pipe": os.mkfifo, "a device": DEVICES["a device"]}.items()},
    "another hash": ("fail", noted(json.dumps({"adamson.zip": "0" * 64}))), "empty": ("fine", noted("{}"))}
HASH_ENTRIES = [Entry("fetch", fetch, cells)]


def group_for(name):
    def change(file):
        del file[name]
        file.create_group(name)
    return on_hdf5(change)


def endless(data):
    "The free rest of a heap of texts gets the length 0, over which HDF5 walks for ever."
    heap = data.index(b"GCOL\x01\0\0\0")
    here, end = heap + 16, heap + int.from_bytes(data[heap + 8:heap + 16], "little")
    while here < end and data[here]:
        here += 16 + -(-int.from_bytes(data[here + 8:here + 16], "little") // 8) * 8
    return data[:here + 8] + bytes(8) + data[here + 16:]


OTHER_FILES = {f"a group for {name}": ("fail", group_for(f"X/{name}")) for name in ("indptr", "indices", "data")}
OTHER_FILES["texts without end"] = "fail", on_bytes(endless)


GROUPS = {
    "files": (FILES, FILE_ENTRIES), "other files": (OTHER_FILES, FILE_ENTRIES),
    "model folders": (MODELS, MODEL_ENTRIES), "Zarr stores": (ZARR, FILE_ENTRIES[:6]),
    "several studies": (STUDIES, STUDY_ENTRIES), "checkpoints": (CHECKPOINTS, CHECKPOINT_ENTRIES),
    "folders of pages": (PAGES, PAGE_ENTRIES),
    "parameters": (PARAMETERS, PARAMETER_ENTRIES), "notebooks": (NOTEBOOKS, NOTEBOOK_ENTRIES), "ledgers": (LEDGERS, LEDGER_ENTRIES),
    "gene sets": (GMT, GMT_ENTRIES), "trees": (TREES, TREE_ENTRIES), "pairs of genes": (PAIRS, PAIR_ENTRIES),
    "perturbation models": (PERTURBATION, PERTURBATION_ENTRIES), "models that ship": (SHIPPED, SHIPPED_ENTRIES),
    "notes of hashes": (HASHES, HASH_ENTRIES),
}
