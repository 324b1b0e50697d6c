"""Does every mesh that the rule admits compute what one device computes, for every mixer?

``python -m tests.system.mesh_table`` takes all pairs too, and writes them down; ``test_sharding.py`` takes one a day.
"""

import itertools

import pytest

from tests.system.mesh_table import BOUND, MESHES, MIXERS, Outcome, compare, name_of, page

PAIRS = list(itertools.product(MIXERS, MESHES))


@pytest.mark.exhaustive
@pytest.mark.parametrize("mesh", MESHES, ids=name_of)
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mesh_gives_the_loss_and_gradients_of_one_device(mixer, mesh):
    outcome = compare(mixer, mesh)
    assert outcome.refused or max(outcome.loss, outcome.gradient) <= BOUND, outcome


def test_the_page_says_what_ran_was_refused_and_went_wrong():
    assert len(PAIRS) == 100
    first, second, third = (f"lte {name_of(mesh)}" for mesh in MESHES[:3])
    done = {
        first: vars(Outcome(None, 1e-7, 2e-6, 3)),
        second: vars(Outcome("lte: mesh.tensor=8 must divide")),
        third: vars(Outcome(None, 1e-7, 2e-3, 1)),
    }
    text = page(done, "command")
    assert "3 of 100 pairs tried: 2 run, 1 refused; the largest difference is 2.0e-03" in text
    for cell in ("| 2.0e-06 (3) |", "| refused |", "| 2.0e-03 (1) **beyond** |", "| not tried |"):
        assert cell in text
