"""The list of models: what is on it, and that nothing else is ever opened."""

import shutil

import pytest

from diffalign.app.shelf import Shelf, models_in
from diffalign.core.registry import parse
from diffalign.embedded.load import folder_of
from diffalign.generate.models import open_model


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(folder_of("emoji"), tmp_path / "models" / "mine")
    return tmp_path / "models"


def test_embedded_models_are_on_the_list_and_others_where_they_are_named(folder):
    assert Shelf().names == ("emoji", "emoji-turbo", "emoji-dit", "emoji-video")
    shelf = Shelf(allow=[str(folder), "owner/name"])
    assert shelf.names[4:] == (str(folder / "mine"), "owner/name")
    assert models_in(str(folder / "mine")) == (str(folder / "mine"),)


def test_tabs_of_images_do_not_offer_a_model_of_videos():
    shelf = Shelf(allow=["owner/name"])
    assert shelf.offered(videos=True) == list(shelf.names)
    assert shelf.offered(videos=False) == [n for n in shelf.names if n != "emoji-video"]


@pytest.mark.parametrize("entry", ["nothing", "a/b/c", "/no/such/folder"])
def test_an_entry_is_a_folder_or_a_hub_id(entry):
    with pytest.raises(ValueError, match="no folder here and no hub id"):
        Shelf(allow=[entry])


def test_a_folder_without_models_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no model"):
        Shelf(allow=[str(tmp_path)])


def test_an_unknown_reward_is_refused():
    with pytest.raises(ValueError, match="Nearest: emoji-clip"):
        Shelf(rewards=["emoji-clop"])
    assert Shelf(rewards=["clip:source=FOLDER"]).rewards[-1] == "clip:source=FOLDER"


@pytest.mark.parametrize("name", ["../../etc", "owner/other", "emoji/../emoji", "", "emoji-judge"])
def test_what_is_not_on_the_list_is_never_opened(shelf, name, monkeypatch):
    monkeypatch.setattr("diffalign.app.shelf.open_model", None)
    with pytest.raises(ValueError, match="not on the list"):
        shelf.open(name)


def test_settings_are_those_of_the_command_line(opened):
    from diffalign.generate.models import Setting

    setting = Setting(steps=4, scale=3.0, negative_prompt="a cat")
    assert opened.setting(4, 3.0, "a cat").call == open_model("emoji", setting).call
    assert opened.setting(4, 3.0, "a cat").facts == open_model("emoji", setting).facts


def test_what_cannot_act_together_is_refused(opened):
    with pytest.raises(ValueError, match="only one can form the prediction"):
        opened.check(parse("cfg+apg"), {"num_inference_steps": 4})
    with pytest.raises(ValueError, match="emoji"):
        opened.check(parse("cat"), {"num_inference_steps": 4})


def test_few_models_stay_loaded(folder):
    shelf = Shelf(allow=[str(folder)], most=1)
    first = shelf.open("emoji")
    assert shelf.open("emoji") is first
    assert shelf.open(str(folder / "mine")).judge is None
    assert shelf.open("emoji") is not first
