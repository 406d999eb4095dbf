"""External tokens: what tables may look like, that a model keeps them by name, and that without them nothing changes."""
import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from toy import CELLS, RECIPE, model, same, toy

import scformer_nb as scf
from scformer_nb.external_tokens import LEAST, field_tokens, read_external, smallest_sets
from scformer_nb.model_files import write_model
from scformer_nb.pretrained import take_over
from scformer_nb.scformer import ScFormer, model_facts
from scformer_nb.tokens import Vocabulary, make_batch

GENES = list(CELLS.var_names)
TABLE = {gene: f"set {j % 4}" for j, gene in enumerate(GENES[:50])}  # ten genes have no token
pytestmark = pytest.mark.filterwarnings("ignore:external '.*' has a token for:UserWarning")


def with_tokens(adata=CELLS, table=TABLE, **how):
    return model(adata, external={"pathway": table}, **how)


# ---- the model

def test_the_start_is_that_of_a_model_without(tmp_path):
    plain, tokens = model(), with_tokens()
    weights, more = plain.network.state_dict(), tokens.network.state_dict()
    assert more.keys() - weights.keys() == {"encoder.external.0.weight"}
    assert all(torch.equal(more[name], w) for name, w in weights.items())
    assert np.array_equal(plain.embed_cells(CELLS), tokens.embed_cells(CELLS))


def test_tokens_learn_and_reach_the_cell_by_gene_name():
    made = with_tokens(epochs=2)
    vectors = made.network.encoder.external[0].weight.detach()
    assert not vectors[0].any() and (vectors[1:].norm(dim=1) > 0).all()
    Z = made.embed_cells(CELLS)
    assert np.abs(made.embed_cells(CELLS[:, ::-1].copy()) - Z).max() < 1e-5
    with torch.no_grad():
        made.network.encoder.external[0].weight.zero_()
    assert np.abs(made.embed_cells(CELLS) - Z).max() > 1e-5


def test_each_token_of_a_mini_batch_is_that_of_its_gene():
    made = with_tokens()
    b = make_batch(made.cells, np.arange(5), 0.4)
    names = ["", *made.vocab.token_names("pathway")]
    for gene, token in zip(b.genes.flatten().tolist(), b.external.flatten().tolist(), strict=True):
        of_gene = made.vocab.genes[gene - 2] if gene > 1 else None
        assert names[token] == TABLE.get(of_gene, "")


def test_fields_go_by_name_whatever_their_order():
    one, two = {"a": TABLE, "b": {GENES[0]: "x"}}, {"b": {GENES[0]: "x"}, "a": TABLE}
    assert same(model(external=one), model(external=two))


def test_saved_and_loaded(tmp_path):
    made = with_tokens(epochs=1)
    made.save(tmp_path / "run")
    loaded = ScFormer.load(tmp_path / "run")
    assert loaded.vocab.external == made.vocab.external == {"pathway": {g: TABLE[g] for g in made.vocab.genes if g in TABLE}}
    assert same(loaded, made) and np.array_equal(loaded.embed_cells(CELLS), made.embed_cells(CELLS))


def test_a_model_from_before_there_were_any(tmp_path):
    made = model()
    facts = model_facts(made)
    assert facts.pop("external") == {}
    write_model(tmp_path / "run", made.network.state_dict(), facts)
    assert same(ScFormer.load(tmp_path / "run"), made)


@pytest.mark.parametrize("external, why", [
    ({"pathway": {"no such gene": "x"}}, "'no such gene', which is no gene of the vocabulary"),
    ({"pathway": {GENES[0]: 3}}, "external.pathway.* is 3, not text"),
    ([], "external is .*, not an object"),
    ({"pathway": {GENES[0]: "x"}}, "encoder.external.0.weight is"),
    ({}, "encoder.external.0.weight is in one of them only"),
])
def test_a_damaged_table_is_refused(external, why, tmp_path):
    made = with_tokens()
    write_model(tmp_path / "run", made.network.state_dict(), model_facts(made) | {"external": external})
    with pytest.raises(ValueError, match=why):
        ScFormer.load(tmp_path / "run")


def test_a_changed_table_does_not_resume(tmp_path):
    with_tokens().fit(1, tmp_path / "run", progress=False)
    other = TABLE | {GENES[0]: "set 1"}
    for made in (with_tokens(table=other), model()):
        with pytest.raises(ValueError, match=r"another recipe or data set \(external tokens\)"):
            made.fit(2, tmp_path / "run", resume=True, progress=False)
    assert len(with_tokens().fit(2, tmp_path / "run", resume=True, progress=False).history) == 2


# ---- several studies, other models

def test_studies_share_one_table():
    studies = {"a": CELLS[:30, :50].copy(), "b": CELLS[30:, 10:].copy()}
    made = with_tokens(studies, batch_key=None)
    assert made.vocab.external["pathway"].keys() == set(TABLE) & set(made.vocab.genes)
    studies["a"].var["family"] = "x"
    with pytest.raises(ValueError, match="several studies have several; give one table for all"):
        with_tokens(studies, "family", batch_key=None)


def test_a_tuned_model_keeps_the_vectors_of_its_tokens(tmp_path):
    old = with_tokens(epochs=2)
    old.save(tmp_path / "old")
    names = [*GENES[:55], *(f"new {j}" for j in range(5))]
    adata, (vectors,) = toy(names=names), [t.weight.detach() for t in old.network.encoder.external]
    tuned = ScFormer.from_pretrained(tmp_path / "old", adata, "batch")
    assert tuned.vocab.external["pathway"] == {g: TABLE[g] for g in tuned.vocab.genes if g in TABLE}
    assert torch.equal(tuned.network.encoder.external[0].weight, vectors)
    wide = {"pathway": {"new 0": "set 2", "new 1": "other", GENES[0]: "set 0"}, "kind": {"new 0": "k"}}
    tuned = ScFormer.from_pretrained(tmp_path / "old", adata, "batch", external=wide)
    kind, pathway = (t.weight.detach() for t in tuned.network.encoder.external)
    row = dict(zip(tuned.vocab.token_names("pathway"), pathway[1:], strict=True))
    known = dict(zip(old.vocab.token_names("pathway"), vectors[1:], strict=True))
    assert torch.equal(row["set 2"], known["set 2"]) and torch.equal(row["set 0"], known["set 0"])
    assert not row["other"].any() and not kind.any()


def test_a_model_with_tokens_may_begin_as_one_without():
    made, old = with_tokens(), model(epochs=1)
    take_over(made, old)
    assert not made.network.encoder.external[0].weight.any()
    assert torch.equal(made.network.encoder.blocks[0].qkv.weight, old.network.encoder.blocks[0].qkv.weight)


# ---- tables

def write_gmt(path, sets):
    path.write_text("\n".join("\t".join([name, "", *genes]) for name, genes in sets.items()))
    return path


def test_every_kind_of_table_says_the_same(tmp_path):
    frame = pd.DataFrame({"gene": list(TABLE), "token": list(TABLE.values()), "more": 1})
    frame.to_csv(tmp_path / "t.csv", index=False)
    var = pd.DataFrame({"family": pd.Series(TABLE, dtype="category")}, index=GENES)
    for given in (TABLE, pd.Series(TABLE), frame, tmp_path / "t.csv", str(tmp_path / "t.csv"), "family"):
        assert field_tokens("f", given, GENES, var) == TABLE


def test_of_several_sets_the_smallest_that_is_large_enough(tmp_path):
    sets = {"small": GENES[:LEAST - 1], "middle": GENES[:LEAST], "large": GENES[:LEAST + 9], "same": GENES[:LEAST]}
    path = write_gmt(tmp_path / "sets.gmt", {name: [*genes, "unknown"] for name, genes in sets.items()})
    found = field_tokens("f", path, GENES)
    assert found == dict.fromkeys(GENES[:LEAST], "middle") | dict.fromkeys(GENES[LEAST:LEAST + 9], "large")
    assert smallest_sets(sets, GENES, least=1)[GENES[0]] == "small"


def test_what_a_table_does_not_know_is_counted():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        field_tokens("f", TABLE | {"elsewhere": "x"}, GENES)
        field_tokens("f", dict.fromkeys(GENES, "x"), GENES)
    assert [str(w.message) for w in caught] == [
        "external 'f' has a token for 50 of the model's 60 genes (4 tokens); 1 of its 51 genes are not in the model"]


@pytest.mark.parametrize("given, why", [
    ({"XIST": "x"}, "a token for none of the model's 60 genes"),
    ({}, "none of the model's 60 genes: it is empty"),
    ({GENES[0]: None}, "it is empty"),
    ({f"ENSG{j:011}": "x" for j in range(9)}, r"the data has gene symbols, the table Ensembl ids; .*rename_genes\(adata, 'ensembl'\)"),
    ({g.upper(): "x" for g in GENES}, "would match but for case"),
    (pd.Series(["x", "y", "x"], [GENES[3], GENES[3], "A"]), f"gene '{GENES[3]}' has two tokens, 'x' and 'y'"),
    (pd.DataFrame({"gene": GENES}), "has no column 'token'"),
    (["x"], "is of type list; a dict, Series or DataFrame"),
    ("familly", "nor a column of var; did you mean 'family'"),
])
def test_bad_tables_are_refused(given, why):
    with pytest.raises(ValueError, match=why) as e:
        field_tokens("pathway", given, GENES, pd.DataFrame({"family": 1}, index=GENES))
    assert "external 'pathway'" in str(e.value)


@pytest.mark.parametrize("field, why", [
    ("gene", "is reserved"), ("perturbation", "is reserved"), ("a b", "is no name"), ("", "is no name"), (3, "is no name")])
def test_bad_names_of_fields_are_refused(field, why):
    with pytest.raises(ValueError, match=why):
        read_external({field: TABLE}, GENES)
    with pytest.raises(ValueError, match="is of type str; it is a dict of fields"):
        read_external("sets.gmt", GENES)


@pytest.mark.parametrize("name, content, why", [
    ("a.gmt", b"one\tx\n", "a.gmt, line 1: a .gmt line is name"), ("a.gmt", b"\xff\xfe", "no text in UTF-8"),
    ("a.gmt", b"", "holds no gene sets"), ("a.gmt", "\t".join(["s", "", *GENES[:5]]).encode(), f"no set has {LEAST}; give larger sets"),
    ("a.csv", b"", "no table of genes and tokens"), ("a.csv", b"gene,token\n\"", "no table of genes and tokens"),
    ("a.csv", b"\xff\xfe\x00", "no text in UTF-8"), ("a.csv", b"G1,x\n", "has no column 'gene'"),
])
def test_broken_files_are_refused(name, content, why, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=why):
        field_tokens("f", str(tmp_path / name), GENES)


@pytest.mark.parametrize("name", ["a.gmt", "a.csv"])
def test_a_file_that_is_not_there_or_is_a_folder(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=name):
        field_tokens("f", tmp_path / name, GENES)
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="is a folder, and an ordinary file is needed"):
        field_tokens("f", tmp_path / name, GENES)


def test_a_vocabulary_has_no_tokens_unless_told():
    assert Vocabulary(GENES).external == {} and Vocabulary(GENES).fields() == []
    assert all(len(field) == len(GENES) for field in Vocabulary(GENES, external={"f": TABLE}).fields())


# ---- the command

def test_the_command(scformer, tmp_path, monkeypatch):
    monkeypatch.setattr(scf.recipe, "DEFAULT", RECIPE)
    CELLS.write_h5ad(tmp_path / "mine.h5ad")
    write_gmt(tmp_path / "sets.gmt", {"first": GENES[:30], "second": GENES[30:]})
    fit = ["fit", tmp_path / "mine.h5ad", "--epochs", "1"]
    tables = ["--external", f"pathway={tmp_path / 'sets.gmt'}", "--external", "mine=batch"]
    assert "'batch' is neither a .gmt or .csv file nor a column of var" in scformer(*fit, *tables, "-o", tmp_path / "no", code=2)[1]
    scformer(*fit, *tables[:2], "-o", tmp_path / "run")
    facts = json.loads((tmp_path / "run/model.json").read_text())
    assert set(facts["external"]["pathway"].values()) == {"first", "second"}
    scformer("embed", tmp_path / "run", tmp_path / "mine.h5ad", "-o", tmp_path / "out.h5ad")
    scformer(*fit, "--from", tmp_path / "run", *tables[:2], "-o", tmp_path / "tuned")
    assert ScFormer.load(tmp_path / "tuned").vocab.external == ScFormer.load(tmp_path / "run").vocab.external
    for given, why in {"pathway": "is no FIELD=TABLE", "batch=a.gmt": "is reserved", "p=no.gmt": "no.gmt does not exist"}.items():
        assert why in scformer(*fit, "--external", given, "-o", tmp_path / "bad", code=2)[1]
