"""The folder of a run: whole files, only its own run, and no code from the file."""

import pickle
from dataclasses import dataclass

import pytest
import torch

from diffalign.alignment.checkpoint import RUN, STATE, Folder
from diffalign.core import Candidate, Lineage, Move, State


@dataclass(frozen=True, slots=True)
class Memory:
    """State of a method from a notebook."""

    count: int
    states: list[State]


def state(level):
    rng = tuple(torch.Generator().manual_seed(i).get_state() for i in range(2))
    return State(torch.full((2, 4), level), 3, 20, rng)


def test_what_is_saved_comes_back(tmp_path):
    folder = Folder(tmp_path / "run", {"prompt": "a dog"})
    assert folder.load() is None
    best = Candidate(0.5, torch.rand(3, 4, 4), Lineage((Move(0, 7), Move(3, 8, back=1))))
    folder.save({"method": Memory(4, [state(0.5)]), "top": [best], "seeds": 9})
    again = Folder(tmp_path / "run", {"prompt": "a dog"}).load()
    assert again["seeds"] == 9
    assert again["method"].count == 4
    assert torch.equal(again["method"].states[0].latents, state(0.5).latents)
    assert again["top"][0].lineage == best.lineage
    assert torch.equal(again["top"][0].image, best.image)


def test_another_run_is_refused_by_what_differs(tmp_path):
    Folder(tmp_path, {"prompt": "a dog", "method": {"name": "dts", "c": 2}}).save({})
    with pytest.raises(ValueError, match=r"holds another run: method differ"):
        Folder(tmp_path, {"prompt": "a dog", "method": {"name": "dts", "c": 3}})


def test_a_folder_without_later_settings_is_refused_by_their_names(tmp_path):
    Folder(tmp_path, {"prompt": "a dog"}).save({})
    with pytest.raises(
        ValueError, match=r"earlier diffalign, which did not note adapters, weights"
    ):
        Folder(tmp_path, {"prompt": "a dog", "weights": {}, "adapters": {}})


def test_a_folder_appears_with_the_first_state(tmp_path):
    folder = Folder(tmp_path / "runs" / "a", {})
    assert not (tmp_path / "runs").exists()
    folder.save({"seeds": 1})
    assert sorted(p.name for p in folder.path.iterdir()) == [RUN, STATE]


@pytest.mark.parametrize("name", ["run", "run/within"])
def test_a_file_in_place_of_the_folder(tmp_path, name):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        Folder(tmp_path / name, {})


def test_a_torn_or_foreign_state_is_refused(tmp_path):
    folder = Folder(tmp_path, {})
    folder.save({"seeds": 1})
    data = (tmp_path / STATE).read_bytes()
    (tmp_path / STATE).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cannot be read .* delete it to start anew"):
        folder.load()


class Runs:
    """A pickle that would run a command."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the file ran')",))


def test_code_in_the_state_does_not_run(tmp_path):
    folder = Folder(tmp_path, {})
    folder.save({})
    torch.save({"method": Runs()}, tmp_path / STATE)
    with pytest.raises(ValueError, match="cannot be read"):
        folder.load()
    (tmp_path / STATE).write_bytes(pickle.dumps(Runs()))
    with pytest.raises(ValueError, match="cannot be read"):
        folder.load()


def test_a_failed_write_leaves_the_state_before(tmp_path):
    folder = Folder(tmp_path, {})
    folder.save({"seeds": 1})
    with pytest.raises(Exception, match="pickle"):
        folder.save({"seeds": lambda: 1})
    assert folder.load() == {"seeds": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([RUN, STATE])
