"""Models on a hub that is a folder."""
import inspect
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from toy import model, same, toy

from scformer_nb.scformer import ScFormer


@pytest.fixture(scope="module")
def trained():
    return model(epochs=2)


# ---- the hub

@pytest.fixture
def hub(monkeypatch, tmp_path):
    "A stand-in for huggingface_hub: a folder, and the calls it got."
    calls = []

    class HfApi:
        def create_repo(self, repo_id, **how):
            calls.append(("create_repo", repo_id, how))

        def upload_folder(self, **how):
            calls.append(("upload_folder", sorted(os.listdir(how["folder_path"])), how))
            shutil.copytree(how["folder_path"], tmp_path / how["repo_id"])
            return f"commit of {how['repo_id']}"

    def snapshot_download(repo_id, **how):
        calls.append(("snapshot_download", repo_id, how))
        return str(tmp_path / repo_id)
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=HfApi, snapshot_download=snapshot_download))
    return calls


def test_a_model_comes_back_from_the_hub(trained, hub):
    assert trained.push_to_hub("lab/toy") == "commit of lab/toy"
    assert same(ScFormer.from_hub("lab/toy", revision="abc"), trained)
    made, sent, got = hub
    assert made == ("create_repo", "lab/toy", {"private": True, "exist_ok": True})
    assert sent[1] == ["README.md", "model.json", "weights.safetensors"] and not Path(sent[2]["folder_path"]).exists()
    assert got[2] == {"revision": "abc", "allow_patterns": ["model.json", "weights.safetensors"]}  # nothing else is downloaded


def test_an_untrained_model_is_not_shared(hub):
    with pytest.raises(ValueError, match="not trained; fit it before you share it"):
        model().push_to_hub("lab/toy")
    assert hub == []


def test_the_hub_is_called_as_it_wants_to_be():
    real = pytest.importorskip("huggingface_hub")
    used = {real.HfApi.create_repo: "repo_id private exist_ok", real.HfApi.upload_folder: "repo_id folder_path commit_message",
            real.snapshot_download: "repo_id revision allow_patterns"}
    for function, names in used.items():
        assert set(names.split()) <= set(inspect.signature(function).parameters)


def test_a_card_says_what_it_knows_and_no_more(trained):
    plain = trained.model_card("lab/toy")
    assert "license" not in plain and "Not stated" in plain and "Metrics" not in plain
    assert "simulated: 60 cells, 60 genes" in plain and "2 sequencing batches" in plain and "2 epochs" in plain
    assert "batch_0" not in plain  # a batch may be named after a donor
    odd = toy()
    odd.uns["dataset"] = "two\nlines | and a bar"
    card = model(odd, batch_key=None).model_card("lab/toy", {"NMI | x": 1}, licence="other: mine")
    assert "two lines | and a bar: 60 cells" in card and "no sequencing batches" in card and "Not trained." in card
    assert 'license: "other: mine"\n---\n' in card and "| NMI / x | 1 |" in card
