"""Models on disk: saved, loaded, cut off, mixed up and hostile."""
import hashlib
import json
import os
import pickle
import shutil
import signal
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from toy import CELLS, RECIPE, Trap, model, same, toy

from scformer_nb import model_files, scformer
from scformer_nb.runs import sigterm_exits
from scformer_nb.scformer import ScFormer


@pytest.fixture
def saved(trained, tmp_path):
    trained.save(tmp_path / "model")
    return tmp_path / "model"


# ---- saved models

def test_a_saved_model_comes_back(trained, Z, saved):
    loaded = ScFormer.load(saved)
    assert same(loaded, trained) and np.array_equal(loaded.embed_cells(CELLS), Z) and loaded.embed_genes().equals(trained.embed_genes())
    assert loaded.history.equals(trained.history) and repr(loaded) == repr(trained)
    loaded.save(saved.parent / "copy")
    assert (saved.parent / "copy/model.json").read_text() == (saved / "model.json").read_text()


def test_both_files_can_be_read_by_others(saved):
    probe = saved / "probe"
    probe.touch()
    assert {(saved / name).stat().st_mode for name in ("model.json", "weights.safetensors")} == {probe.stat().st_mode}


NUMPY = {
    "seed": dict(seed=np.int64(3)),
    "n_bins": dict(n_bins=np.int32(11)),
    "n_hvg": dict(n_hvg=np.int64(20)),
    "recipe": dict(recipe=replace(RECIPE, d_ff=np.int64(16), ecs=np.float32(1))),
}


@pytest.mark.parametrize("case", NUMPY)
def test_numpy_numbers_can_be_saved(case, tmp_path):
    made = model(**NUMPY[case])
    made.save(tmp_path / "model")
    assert same(ScFormer.load(tmp_path / "model"), made)


@pytest.mark.parametrize("layer", ["../../x", "a/b", "/etc/passwd"])
def test_the_name_of_a_layer_is_never_a_path(saved, layer):
    facts = json.loads((saved / "model.json").read_text())
    facts["settings"]["layer"] = layer
    model_files.write_model(saved, safetensors.torch.load_file(saved / "weights.safetensors"), facts, overwrite=True)
    loaded, there = ScFormer.load(saved), sorted(saved.parent.rglob("*"))
    with pytest.raises(ValueError, match=f"trained on layer '{layer}', which these cells do not have"):
        loaded.embed_cells(CELLS)
    assert np.isfinite(loaded.embed_cells(CELLS, layer="X")).all() and sorted(saved.parent.rglob("*")) == there


def test_gene_names_that_are_whole_numbers_are_text(tmp_path):
    made = model(toy(names=range(60)))
    assert all(isinstance(gene, str) for gene in made.vocab.genes) and set(made.vocab.genes) <= set(map(str, range(60)))
    made.save(tmp_path / "model")
    assert same(ScFormer.load(tmp_path / "model"), made)
    with pytest.raises(ValueError, match="only 0 of the model.s 60 genes"):
        made.embed_cells(CELLS)


def test_a_model_is_not_overwritten_by_chance(trained, saved):
    before = (saved / "model.json").read_bytes()
    other = model(seed=1)
    with pytest.raises(FileExistsError, match="model holds a model; choose another folder or say overwrite=True"):
        other.save(saved)
    assert (saved / "model.json").read_bytes() == before and same(ScFormer.load(saved), trained)
    other.save(saved, overwrite=True)
    assert same(ScFormer.load(saved), other) and sorted(p.name for p in saved.iterdir()) == ["model.json", "weights.safetensors"]


def test_saving_where_nothing_can_be_written(trained, unwritable):
    with pytest.raises(OSError, match=f"cannot write {unwritable}"):
        trained.save(unwritable)


def test_a_full_disk_leaves_the_old_model(trained, saved):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"cannot write {saved}"):
            model(seed=1).save(saved, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert same(ScFormer.load(saved), trained)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [1, 2])
def test_a_signal_in_a_save_waits_until_both_files_are_named(saved, monkeypatch, at, number):
    def stop(source, target):
        moves.append(target)
        if len(moves) == at:
            signal.raise_signal(number)
        return move(source, target)
    moves, move, new = [], os.replace, model(seed=1)
    monkeypatch.setattr(os, "replace", stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
    with sigterm_exits(), pytest.raises((KeyboardInterrupt, SystemExit)):
        new.save(saved, overwrite=True)
    assert len(moves) == 2 and same(ScFormer.load(saved), new)


def test_a_save_whose_second_file_fails_is_never_half_of_two_models(trained, saved, monkeypatch):
    def fail(source, target):
        moves.append(target)
        if len(moves) == at:
            raise OSError("the disk is gone")
        return move(source, target)
    move = os.replace
    for at in (1, 2):
        moves = []
        with monkeypatch.context() as patch, pytest.raises(OSError, match="cannot write .*the disk is gone"):
            patch.setattr(os, "replace", fail)
            model(seed=1).save(saved, overwrite=True)
        if at == 1:
            assert same(ScFormer.load(saved), trained)
    with pytest.raises(ValueError, match="belong together"):
        ScFormer.load(saved)


def test_a_save_that_is_killed_between_its_files_is_complete(saved, tmp_path):
    "The weights have their name, and the facts still that under which they were written."
    new, beside = model(seed=1), saved / ".model.json.0123456789abcdef"
    new.save(tmp_path / "new")
    shutil.copy(tmp_path / "new/weights.safetensors", saved)
    beside.write_bytes((tmp_path / "new/model.json").read_bytes())
    assert same(ScFormer.load(saved), new)
    (saved / "model.json").unlink()
    assert same(ScFormer.load(saved), new)
    beside.write_bytes(beside.read_bytes()[:-1])
    with pytest.raises(FileNotFoundError, match="model.json is missing"):
        ScFormer.load(saved)


def test_a_model_that_is_replaced_while_it_is_read_is_refused(saved, monkeypatch):
    "Facts of the old one and weights of the new one would be a model that nobody trained."
    read = scformer.read_facts
    monkeypatch.setattr(scformer, "read_facts", lambda *args: (read(*args), model(seed=1).save(saved, overwrite=True))[0])
    with pytest.raises(ValueError, match="weights.safetensors has changed while it was read"):
        ScFormer.load(saved)


@pytest.mark.parametrize("missing", ["model.json", "weights.safetensors", "the folder"])
def test_a_model_with_a_part_missing(saved, missing):
    shutil.rmtree(saved) if missing == "the folder" else (saved / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"{saved} holds no saved model: .* is missing"):
        ScFormer.load(saved)


def test_a_model_of_another_format(saved):
    facts = json.loads((saved / "model.json").read_text())
    (saved / "model.json").write_text(json.dumps(facts | {"format": 2, "versions": {"scformer_nb": "9.9"}}))
    (saved / "weights.safetensors").write_bytes(b"of another kind")
    with pytest.raises(ValueError, match="has format 2, this version reads 1; install scformer_nb 9.9"):
        ScFormer.load(saved)


GARBAGE = {
    "not JSON": lambda facts: "{]",
    "empty": lambda facts: "",
    "a list": lambda facts: "[1]",
    "a number": lambda facts: "3",
    "null": lambda facts: "null",
    "cut off": lambda facts: json.dumps(facts)[:500],
    "not text": lambda facts: b"\xff\xfe\x00garbage",
    "the format alone": lambda facts: {"format": 1},
    "odd versions": lambda facts: facts | {"format": 2, "versions": []},
    "genes are a number": lambda facts: facts | {"genes": 3},
    "a gene less": lambda facts: facts | {"genes": facts["genes"][1:]},
    "genes in another order": lambda facts: facts | {"genes": facts["genes"][::-1]},
    "other specials": lambda facts: facts | {"specials": ["x"]},
    "no recipe": lambda facts: facts | {"recipe": None},
    "an unknown option": lambda facts: facts | {"recipe": facts["recipe"] | {"new": 1}},
    "heads that do not fit": lambda facts: facts | {"recipe": facts["recipe"] | {"n_heads": 3}},
    "another size": lambda facts: facts | {"recipe": facts["recipe"] | {"dim": 8}},
    "a size of text": lambda facts: facts | {"recipe": facts["recipe"] | {"dim": "16"}},
    "no layer": lambda facts: facts | {"settings": {k: v for k, v in facts["settings"].items() if k != "layer"}},
    "settings are a list": lambda facts: facts | {"settings": []},
    "seed is text": lambda facts: facts | {"settings": facts["settings"] | {"seed": "x"}},
    "no history": lambda facts: {k: v for k, v in facts.items() if k != "history"},
    "history is text": lambda facts: facts | {"history": "abc"},
}


@pytest.mark.parametrize("case", GARBAGE)
def test_garbage_in_model_json(saved, case):
    wrong = GARBAGE[case](json.loads((saved / "model.json").read_text()))
    wrong = wrong if isinstance(wrong, (str, bytes)) else json.dumps(wrong)
    (saved / "model.json").write_bytes(wrong if isinstance(wrong, bytes) else wrong.encode())
    with pytest.raises(ValueError, match=f"{saved}"):
        ScFormer.load(saved)


OTHERS = {
    "another seed": lambda: model(seed=1),
    "other genes, as many": lambda: model(toy(names=[f"other_{i}" for i in range(60)])),
    "another size": lambda: model(recipe=replace(RECIPE, d_ff=32)),
    "other batches": lambda: model(batch_key=None),
}


@pytest.mark.parametrize("case", OTHERS)
def test_weights_of_another_model(saved, tmp_path, case):
    OTHERS[case]().save(tmp_path / "other")
    shutil.copy(tmp_path / "other/weights.safetensors", saved)
    with pytest.raises(ValueError, match=f"{saved} do not belong together"):
        ScFormer.load(saved)


WEIGHTS = {
    "pickle": lambda trap: pickle.dumps(trap),
    "torch": lambda trap: torch_bytes({"weight": trap}),
    "empty": lambda trap: b"",
    "text": lambda trap: b"garbage" * 100,
    "no tensors": lambda trap: safetensors.torch.save({}),
}


def torch_bytes(what):
    with tempfile.TemporaryFile() as file:
        torch.save(what, file)
        file.seek(0)
        return file.read()


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_are_never_executed(saved, tmp_path, case):
    (saved / "weights.safetensors").write_bytes(WEIGHTS[case](Trap(tmp_path / "sprung")))
    with pytest.raises(ValueError, match=f"{saved}"):
        ScFormer.load(saved)
    assert not (tmp_path / "sprung").exists()


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))  # noqa: S301 of the test itself
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_weights_that_are_cut_off(saved, share):
    whole = (saved / "weights.safetensors").read_bytes()
    (saved / "weights.safetensors").write_bytes(whole[:int(share * len(whole))])
    with pytest.raises(ValueError, match="is cut off or damaged .*; copy or save it again"):
        ScFormer.load(saved)


@pytest.mark.parametrize("change,message", [
    (lambda weights: {k: v.index_fill(0, torch.tensor(0), np.nan) if k == "encoder.gene.weight" else v for k, v in weights.items()},
     "encoder.gene.weight in .* has NaN or infinite values; copy or train the model again"),
    (lambda weights: {k: v for k, v in weights.items() if k != "encoder.gene.weight"}, "do not belong together")],
    ids=["NaN", "a tensor is missing"])
def test_weights_that_are_spoilt(trained, saved, change, message):
    model_files.write_model(saved, change(trained.network.state_dict()), scformer.model_facts(trained), overwrite=True)
    with pytest.raises(ValueError, match=message):
        ScFormer.load(saved)


# ---- hostile model folders

def save_as(folder, network=None, text=None, **changes):
    "A model folder with something changed, its digest as it should be; `a__b` is the entry b of a."
    facts = json.loads((folder / "model.json").read_text())
    for path, value in changes.items():
        place, name = (facts[path.split("__")[0]] if "__" in path else facts), path.split("__")[-1]
        place[name] = value
    text = json.dumps(facts).encode() if text is None else text
    weights = safetensors.torch.load_file(folder / "weights.safetensors")
    data = safetensors.torch.save((network or (lambda w: w))(weights), {"model.json": hashlib.sha256(text).hexdigest()})
    (folder / "model.json").write_bytes(text)
    (folder / "weights.safetensors").write_bytes(data)


def gene_table(change):
    return lambda weights: weights | {"encoder.gene.weight": change(weights["encoder.gene.weight"]).contiguous()}


HOSTILE = {
    "a width of a terabyte": (dict(recipe__dim=10**9), "dim is 1000000000, which does not fit"),
    "a width of another size": (dict(recipe__dim=32), "do not belong together: .* is .*, not "),
    "a width beyond 64 bits": (dict(recipe__dim=10**20), "dim is 1000.*, which does not fit"),
    "a million blocks": (dict(recipe__n_blocks=10**6), "n_blocks is 1000000, which does not fit"),
    "bins without end": (dict(settings__n_bins=5 * 10**6), "n_bins is 5000000, not from 2 to 65536"),
    "one bin": (dict(settings__n_bins=1), "n_bins is 1, not from 2"),
    "a negative seed": (dict(settings__seed=-3), "seed is -3, not from 0"),
    "heads as a float": (dict(recipe__n_heads=4.0), "recipe.n_heads is 4.0, not a whole number"),
    "true as a number": (dict(format=True), "format is True, not a whole number"),
    "a pool of code": (dict(recipe__pool="__import__('os')"), "__import__"),
    "an unknown option": (dict(recipe__evil=1), "evil"),
    "a layer as a list": (dict(settings__layer=[1]), "layer is .1., not text or null"),
    "three batches": (dict(settings__batches=["a", "b", "c"]), "do not belong together: heads.batch.weight is .2, 16., not .3, 16."),
    "genes as a text": (dict(genes="x" * 60), "genes is 'x*\\.\\.\\.x*', not a list"),
    "genes twice": (dict(genes=["gene"] * 60), "59 gene names are duplicates"),
    "half a character": (dict(genes=["\ud800", *(f"gene_{i}" for i in range(59))]), "genes.0. is .*, not text"),
    "a nested history": (dict(history=[{"epoch": [1]}]), "history.0..epoch is .1., not a number or null"),
    "versions as a list": (dict(versions=[1]), "versions is .1., not an object"),
    "JSON without end": (dict(text=b"[" * 200_000), "model.json: maximum recursion depth"),
    "a number of 6,000 digits": (dict(text=b'{"format": ' + b"9" * 6000 + b"}"), "cut off or damaged"),
    "whole numbers as weights": (dict(network=gene_table(lambda w: w.int())), "gene.weight is of type I32, not F32"),
    "complex weights": (dict(network=gene_table(lambda w: w.to(torch.complex64))), "gene.weight is of type C64"),
    "weights of 8 bits": (dict(network=gene_table(lambda w: w.to(torch.float8_e4m3fn))), "gene.weight is of type F8_E4M3"),
    "a tensor more": (dict(network=lambda w: w | {"evil": torch.zeros(3)}), "evil is in one of them only"),
    "weights beyond 32 bits": (dict(network=gene_table(lambda w: w.double() * 0 + 1e300)), "NaN or infinite values"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_model_folder_is_refused_before_anything_is_built(saved, case, monkeypatch):
    changes, message = HOSTILE[case]
    save_as(saved, **changes)
    built, build = [], scformer.build_network
    monkeypatch.setattr(scformer, "build_network", lambda *how: built.append(build(*how)) or built[-1])
    with pytest.raises(ValueError, match=message) as error:
        ScFormer.load(saved)
    assert str(saved) in str(error.value)
    assert all(weight.is_meta for network in built for weight in network.parameters())


@pytest.mark.parametrize("dtype,error", [(torch.float64, 0), (torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_weights_of_other_precision_are_converted(saved, Z, dtype, error):
    save_as(saved, network=lambda weights: {k: w.to(dtype) if w.is_floating_point() else w for k, w in weights.items()})
    loaded = ScFormer.load(saved)
    assert {w.dtype for w in loaded.network.parameters()} == {torch.float32}
    assert np.abs(loaded.embed_cells(CELLS) - Z).max() <= error


def test_an_embedding_that_is_not_finite_is_never_returned(saved):
    save_as(saved, network=gene_table(lambda w: w * 0 + 3e38))
    loaded = ScFormer.load(saved)  # all of its weights are finite
    with pytest.raises(ValueError, match="60 of 60 cells get NaN instead of an embedding"):
        loaded.embed_cells(CELLS)


@pytest.mark.parametrize("name", ["model.json", "weights.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link to nothing"])
def test_what_is_no_file_is_not_opened(saved, name, kind):
    (saved / name).unlink()
    {"pipe": lambda: os.mkfifo(saved / name), "folder": (saved / name).mkdir, "device": lambda: (saved / name).symlink_to("/dev/zero"),
     "link to nothing": lambda: (saved / name).symlink_to("nowhere")}[kind]()
    with pytest.raises((ValueError, FileNotFoundError), match=f"{saved}.*({name}|is missing)"):
        ScFormer.load(saved)


def test_a_model_of_perturbations_is_not_one_of_cells(saved):
    save_as(saved, kind="perturbation")
    with pytest.raises(ValueError, match=f"{saved} holds another kind of model; load it with PerturbationModel.load"):
        ScFormer.load(saved)


def test_a_planted_link_is_not_followed(trained, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("weights.new", "json.new", ".new.model.json", "model.json", "weights.safetensors"):
        (folder / name).symlink_to(victim)
    trained.save(folder, overwrite=True)
    assert victim.read_text() == "mine" and same(ScFormer.load(folder), trained)


def test_a_failed_save_leaves_nothing(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_bytes", lambda self, data: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="no space is left"):
        trained.save(tmp_path / "model")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
