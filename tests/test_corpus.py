"""A sample of the corpus of broken inputs, and all cases of its readers of text; `make stress` has all of it."""
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "stress"))
import corpus  # noqa: E402
from corpus_own import GROUPS, rows  # noqa: E402
from entries import Entry, cells  # noqa: E402

from scformer_nb.tokens import read_gmt  # noqa: E402

SETS = [Entry("read_gmt", lambda path, out: lambda: read_gmt(path), cells)]
TEXTS = {group: GROUPS[group] for group in ("ledgers", "trees", "notes of hashes", "notebooks")}
TEXTS["gene sets"] = {name: case for name, case in GROUPS["gene sets"][0].items() if name != "other genes"}, SETS


@pytest.mark.parametrize("group,case", [(group, case) for group, (cases, _) in TEXTS.items() for case in cases])
def test_texts_are_answered(group, case, tmp_path):
    (cases, (entry,)), out = TEXTS[group], tmp_path / "out"
    out.mkdir()
    want, make = cases[case]
    assert not corpus.judge(entry, want, make(None, tmp_path), None, out)


@pytest.mark.parametrize("want,content", [("fail", "first\t\tgene"), ("any", b"\xff")])
def test_what_is_wrong_would_be_seen(want, content, tmp_path):
    make, = rows("case.gmt", {"case": content}, want).values()
    lenient = Entry("read", lambda path, out: lambda: path.read_text(encoding="utf-8"), cells)
    assert corpus.judge(lenient, want, make[1](None, tmp_path), None, tmp_path)


def test_a_folder_that_holds_half_an_output_would_be_seen(tmp_path):
    def half(path, out):
        def act():
            out.write_text("half")
            raise FileNotFoundError(f"{path} is gone")
        return act
    assert corpus.judge(Entry("half", half, cells), "fail", tmp_path / "case", None, tmp_path) == "something is left: ['out']"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is Linux's")
def test_a_sample_of_all_is_answered(tmp_path):
    groups = [group for group in GROUPS if group not in TEXTS]
    wrong, _ = corpus.watch(groups, tmp_path, every=50)
    assert not {case: said for case, said in wrong.items() if said} and len(wrong) > len(groups)
