"""The perturbation network: what it is asked, and the recipes that shape it."""
from dataclasses import asdict

from toy import SMALL_SCREEN

from scformer_nb.perturbation_network import PerturbationRecipe, unseen_cases
from scformer_nb.screens import parse_condition


def test_cases_never_show_what_is_asked():
    table = unseen_cases(["A", "B", "C", "A+B", "A+C", "B+C"])
    for c, unseen, rows in table.itertuples(index=False):
        names = [["A", "B", "C", "A+B", "A+C", "B+C"][i] for i in rows]
        seen = {g for n in names for g in parse_condition(n)}
        assert c not in names and int(unseen[0]) == len(set(parse_condition(c)) - seen)
    assert {"1/1", "0/2", "1/2", "2/2"} == set(table.unseen)


def test_recipes_of_earlier_versions_are_read():
    first_names = {"linear_init": "start", "d_ff": "hidden", "svd_init": "warm_start"}
    assert PerturbationRecipe.from_dict({first_names.get(k, k): v for k, v in asdict(SMALL_SCREEN).items()}) == SMALL_SCREEN
