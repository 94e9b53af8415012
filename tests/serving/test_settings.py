"""Settings of serving: what is read, what is refused, and how much of a request is covered."""

from __future__ import annotations

import pytest
import torch

from keepkv import InputError, KeepKVError, allot
from keepkv.methods import METHODS
from keepkv.serving.settings import Settings

SETTINGS = Settings(budget=32, window=16, step=32, references=64)


def test_covered_is_whole_steps_and_leaves_the_window() -> None:
    before = 0
    for seen in range(2000):
        covered = SETTINGS.covered(seen)
        assert covered % SETTINGS.step == 0
        assert covered == 0 or covered > SETTINGS.budget
        assert covered == 0 or SETTINGS.window <= seen - covered < SETTINGS.window + SETTINGS.step
        assert covered >= before
        held = SETTINGS.budget * (covered > 0) + seen - covered
        assert held <= SETTINGS.peak(0)
        before = covered


def test_settings_are_read_and_refused() -> None:
    assert Settings.read({}) is None
    assert Settings.read(None) is None
    assert Settings.read({"keepkv": False}) is None
    assert Settings.read({"keepkv": True}) == Settings()
    assert Settings.read(SETTINGS.to_dict()) == SETTINGS
    for told, says in (
        ({"budgets": 3}, "did you mean 'budget'"),
        ({"budget": "10%"}, "positive whole number"),
        ({"budget": 0}, "positive whole number"),
        ({"budget": True}, "positive whole number"),
        ({"method": "kvzip"}, "repeated"),
        ({"method": "minicache"}, "layers together"),
        ({"method": "criticalkv"}, "projections"),
        ({"method": "full"}, "every token"),
        ({"method": "nobody"}, "nobody"),
    ):
        with pytest.raises(KeepKVError, match=says):
            Settings.read({"keepkv": told})
    with pytest.raises(InputError, match="take 32"):
        Settings(budget=40).check_blocks(32)


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_says_of_itself_decides_whether_it_can_be_served(name: str) -> None:
    method = METHODS[name]
    repeated = method.repeat is not None and method.repeat.needed
    if method.keeps_all or repeated or method.layer_pairs or method.needs_projection:
        with pytest.raises(InputError):
            Settings.read({"keepkv": {"method": name}})
    else:
        served = Settings(method=name).uniform_method()
        assert (served.allot, served.trials) == (allot.alike, ())


def test_slots_that_are_whole_for_every_head_are_allotted_alike_by_any_uniform_rule() -> None:
    """What a server asks for, so methods whose heads keep the same tokens need no rule of their own."""
    scores = torch.rand(3, 2, 50)
    wanted = [[7, 7]] * 3
    assert all(rule(scores, 42) == wanted for rule in (allot.alike, allot.together(allot.alike), allot.together(allot.uniform)))
