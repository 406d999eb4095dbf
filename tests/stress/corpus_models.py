"""Broken and hostile model folders, their digest made right as an attacker would: name, what must come of it, what is done.

fail: it is refused before anything is built. same: it is the good model. any: refused, or a model whose numbers are finite.
"""
import functools
import hashlib
import json
import os
import shutil
import struct

import safetensors.torch as st
import torch

GONE = object()
TABLE = "encoder.gene.weight"
FACTS, WEIGHTS = "model.json", "weights.safetensors"


def read(good):
    return json.loads((good / FACTS).read_text()), st.load_file(good / WEIGHTS)


def write(folder, text, weights):
    folder = folder / "case"
    folder.mkdir()
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    (folder / FACTS).write_bytes(text)
    (folder / WEIGHTS).write_bytes(st.save(weights, {FACTS: hashlib.sha256(text).hexdigest()}))
    return folder


# ---- ways to change a folder: each gives a function of the good one and of a place, which gives the path of the new one

def fact(path, value):
    "One entry, a.b for b of a, is another value, one made of the old, or gone."
    def make(good, folder):
        facts, weights = read(good)
        *above, name = path.split(".")
        place = functools.reduce(dict.__getitem__, above, facts)
        if value is GONE:
            place.pop(name, None)
        else:
            place[name] = value(place[name]) if callable(value) else value
        return write(folder, facts, weights)
    return make


def text(change):
    "The bytes of the JSON are others, made of the facts."
    return lambda good, folder: write(folder, change(read(good)[0]), read(good)[1])


def tensor(change, name=TABLE):
    "A tensor is another, made of the old, or gone."
    def make(good, folder):
        facts, weights = read(good)
        weights[name] = weights[name] if change is GONE else change(weights[name]).contiguous()
        if change is GONE:
            del weights[name]
        return write(folder, facts, weights)
    return make


def tensors(change):
    return lambda good, folder: write(folder, read(good)[0], change(read(good)[1]))


def file(change, name=WEIGHTS):
    "The bytes of a file are others."
    def make(good, folder):
        shutil.copytree(good, folder / "case")
        path = folder / "case" / name
        path.write_bytes(change(path.read_bytes()))
        return folder / "case"
    return make


def header(change):
    "The header of the weights is another."
    def to(data):
        n, = struct.unpack("<Q", data[:8])
        head = json.loads(data[8:8 + n])
        change(head)
        new = json.dumps(head).encode()
        return struct.pack("<Q", len(new)) + new + data[8 + n:]
    return file(to)


def instead(put, name=FACTS):
    "Something else lies where a file was."
    def make(good, folder):
        shutil.copytree(good, folder / "case")
        (folder / "case" / name).unlink()
        put(folder / "case" / name)
        return folder / "case"
    return make


def spoilt(value):
    def change(w):
        w.view(-1)[0] = value
        return w
    return change


ROOTS = "format kind versions settings recipe genes specials history".split()
SETTINGS = "batch_key layer n_bins seed n_cells hvg batches dataset studies".split()
OTHER = {"null": None, "a list": [1], "text": "x", "a number": 5}
ODD = {"text": "x", "a list of lists": [[1]], "1.5": 1.5, "-3": -3, "10^30": 10**30, "an object": {"a": 1}, "true": True}
FINE = {"seed", "kind", "studies"}  # what older models lack, or a value of which is as good as another

SIZES = {"recipe.dim": [10**6, 10**9, 10**20, "128", 128.0, 0, -4], "recipe.n_blocks": [10**5, 10**9, 0],
         "recipe.d_ff": [10**9], "recipe.latent": [10**9], "recipe.n_heads": [4.0, 3], "recipe.loss": ["x"], "recipe.evil": [1],
         "recipe.genes": ["__import__('os')"], "recipe.lr": [float("nan"), "fast"], "recipe.value": ["table"],
         "settings.n_bins": [10**10, 5 * 10**6, 70_000, 1, 0]}

MODELS = {
    # an entry is missing or of another kind
    **{f"no {k}": ("any" if k in FINE else "fail", fact(k, GONE)) for k in ROOTS},
    **{f"no settings.{k}": ("any" if k in FINE else "fail", fact(f"settings.{k}", GONE)) for k in SETTINGS},
    **{f"{k} is {how}": ("any", fact(k, value)) for k in ROOTS if k != "kind" for how, value in OTHER.items()},
    **{f"settings.{k} is {how}": ("any", fact(f"settings.{k}", value)) for k in ("seed", "n_bins", "batches", "batch_key", "layer")
       for how, value in ODD.items()},
    # sizes and options that no weights have
    **{f"{k} is {value!r}": ("fail", fact(k, value)) for k, values in SIZES.items() for value in values if value == value},
    "recipe.lr is NaN": ("any", fact("recipe.lr", float("nan"))),
    # genes, special tokens, format
    "every gene the same": ("fail", fact("genes", lambda v: [v[0]] * len(v))),
    "half of the genes": ("fail", fact("genes", lambda v: v[:len(v) // 2])),
    "a gene more": ("fail", fact("genes", lambda v: [*v, "x"])),
    "genes are numbers": ("fail", fact("genes", lambda v: list(range(len(v))))),
    "genes the other way round": ("any", fact("genes", lambda v: v[::-1])),
    "genes are one text": ("fail", fact("genes", lambda v: "".join(chr(0x4e00 + i) for i in range(len(v))))),
    "genes are lists": ("fail", fact("genes", lambda v: [[g] for g in v])),
    "half a character": ("fail", fact("genes", lambda v: ["\ud800", *v[1:]])),
    "one special token": ("fail", fact("specials", ["<pad>"])),
    "special tokens swapped": ("fail", fact("specials", lambda v: v[::-1])),
    "a special token more": ("fail", fact("specials", lambda v: [*v, "x"])),
    **{f"format {value!r}": ("fail", fact("format", value)) for value in (2, "1", True, 1.0)},
    # names that are paths or markup
    "batch_key is a path": ("any", fact("settings.batch_key", "../../etc/passwd")),
    "layer is a path": ("any embed:fail", fact("settings.layer", "../../x")),
    "batches nobody trained": ("fail", fact("settings.batches", ["a", "b", "c"])),
    "hvg is text": ("fail", fact("settings.hvg", "x")),
    "n_cells is text": ("fail", fact("settings.n_cells", "many")),
    "dataset is a list": ("fail", fact("settings.dataset", [1])),
    "dataset is HTML": ("any", fact("settings.dataset", "<script>alert(1)</script>")),
    "history of lists": ("fail", fact("history", [{"epoch": [1, 2]}, 5])),
    "history is a dict": ("fail", fact("history", {"a": {"b": 1}})),
    "versions of versions": ("fail", fact("versions", {"a": {"b": [1]}})),
    # the text of the JSON
    **{f"JSON: {name}": ("fail", text(lambda facts, raw=raw: raw)) for name, raw in {
        "[]": b"[]", "null": b"null", "5": b"5", "nothing": b"", "[[[[": b"[" * 200_000, "{{{{": b'{"a":' * 200_000,
        "no UTF-8": b'{"format":"\xff"}'}.items()},
    "JSON: NaN": ("fail", text(lambda f: json.dumps(f | {"settings": f["settings"] | {"seed": float("nan")}}).encode())),
    "JSON: 6,000 digits": ("fail", text(lambda f: json.dumps(f).replace('"seed": 0', '"seed": ' + "9" * 6000).encode())),
    "JSON: UTF-16": ("any", text(lambda f: json.dumps(f).encode("utf-16"))),
    "JSON: BOM": ("any", text(lambda f: b"\xef\xbb\xbf" + json.dumps(f).encode())),
    "JSON: a key twice": ("same", text(lambda f: json.dumps(f).encode()[:-1] + b',"format":1}')),
    # tensors
    "weights NaN": ("fail", tensor(lambda w: w * float("nan"))),
    "a weight infinite": ("fail", tensor(spoilt(float("inf")))),
    "fewer rows": ("fail", tensor(lambda w: w[:50])),
    "a tensor is missing": ("fail", tensor(GONE)),
    "a tensor more": ("fail", tensors(lambda w: w | {"evil": torch.zeros(3)})),
    "no tensors": ("fail", tensors(lambda w: {})),
    "64 bits": ("same", tensor(lambda w: w.double())),
    **{str(kind).split(".")[1]: ("any", tensor(lambda w, kind=kind: w.to(kind))) for kind in (torch.float16, torch.bfloat16)},
    **{str(kind).split(".")[1]: ("fail", tensor(lambda w, kind=kind: w.to(kind)))
       for kind in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn)},
    "all zero": ("any", tensor(lambda w: w * 0)),
    "all huge": ("any", tensor(lambda w: w * 0 + 3e38)),
    # the file of the weights
    "header of 2^62 bytes": ("fail", file(lambda b: struct.pack("<Q", 2**62) + b[8:])),
    "header of 100 MB": ("fail", file(lambda b: struct.pack("<Q", 10**8) + b[8:])),
    "header of 0 bytes": ("fail", file(lambda b: struct.pack("<Q", 0) + b[8:])),
    "weights cut off": ("fail", file(lambda b: b[:len(b) // 2])),
    "weights empty": ("fail", file(lambda b: b"")),
    "a pickle": ("fail", file(lambda b: b"\x80\x02cos\nsystem\nX\x10\x00\x00\x00touch ./sprung.f\x85R.")),
    "weights and a tail": ("fail", file(lambda b: b + b"x" * 100)),
    "offsets below 0": ("fail", header(lambda h: h[TABLE].update(data_offsets=[-8, 100]))),
    "offsets of 2^60": ("fail", header(lambda h: h[TABLE].update(data_offsets=[0, 2**60]))),
    "a shape of 2^80": ("fail", header(lambda h: h[TABLE].update(shape=[2**40, 2**40]))),
    "an unknown type": ("fail", header(lambda h: h[TABLE].update(dtype="EVIL"))),
    "tensors that overlap": ("fail", header(lambda h: h[TABLE].update(data_offsets=[0, h[TABLE]["data_offsets"][1] - 4]))),
    "no digest": ("fail", header(lambda h: h.pop("__metadata__"))),
    "a digest of another kind": ("fail", header(lambda h: h["__metadata__"].update(x=5))),
    # no files
    **{f"model.json is {name}": ("fail", instead(put)) for name, put in {
        "a folder": os.mkdir, "a pipe": os.mkfifo, "a device": lambda path: path.symlink_to("/dev/zero")}.items()},
    "an empty folder": ("fail", lambda good, folder: (folder / "case").mkdir() or folder / "case"),
    "a file": ("fail", lambda good, folder: shutil.copy(good / FACTS, folder / "case")),
    "nothing": ("fail", lambda good, folder: folder / "case"),
}
