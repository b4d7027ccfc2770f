"""Rows of a denoiser's arguments, wherever they lie."""

from dataclasses import replace

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from diffalign.families.flux import FLUX
from diffalign.families.text import Argument
from diffalign.seams.denoiser.rows import (
    count_rows,
    doubled,
    halves_equal,
    parameter_names,
    prediction_of,
    take,
    take_arguments,
    with_prediction,
)

STATES = torch.arange(2 * 3 * 4.0).reshape(2, 3, 4)


def test_rows_on_the_first_axis_and_on_another():
    assert torch.equal(take(STATES, [1], 2), STATES[1:])
    assert torch.equal(take(STATES, [1, 0, 1], 2), STATES[[1, 0, 1]])
    assert torch.equal(take(STATES, [2, 0], 3, axis=1), STATES[:, [2, 0]])
    assert torch.equal(take(STATES, [1, 2], 3, axis=1), STATES[:, 1:])
    assert take(STATES, [0], 5) is STATES
    assert take(STATES, [0], 5, axis=1) is STATES
    scalar = torch.tensor(1.0)
    assert take(scalar, [0], 1) is scalar


def test_the_family_says_where_rows_lie():
    family = replace(FLUX, text=(Argument("text"), Argument("states", axis=2, rows=1)))
    assert family.row_axes == {"states": 1}
    arguments = {
        "hidden_states": torch.arange(3.0),
        "text": torch.arange(3.0).reshape(3, 1),
        # as many layers as there are rows
        "states": torch.arange(9.0).reshape(3, 3, 1),
        "img_ids": torch.zeros(3, 3),
    }
    changed = take_arguments(arguments, [2, 1], 3, family)
    assert changed["hidden_states"].tolist() == [2.0, 1.0]
    assert changed["text"].tolist() == [[2.0], [1.0]]
    assert torch.equal(changed["states"], arguments["states"][:, [2, 1]])
    assert changed["img_ids"] is arguments["img_ids"]


def test_pictures_of_adapters_are_split_and_their_masks_are_not():
    pictures, masks = torch.arange(4.0).reshape(2, 2), torch.zeros(2, 5)
    within = {
        "ip_hidden_states": [pictures],
        "ip_adapter_masks": [masks],
        "scale": torch.ones(2),
        "gligen": torch.arange(2.0),
    }
    names = ("joint_attention_kwargs", "cross_attention_kwargs")
    changed = take_arguments(dict.fromkeys(names, within), [1], 2, FLUX)
    shared, split = (changed[name] for name in names)
    for part in (shared, split):
        assert part["ip_hidden_states"][0].tolist() == [[2.0, 3.0]]
        assert part["ip_adapter_masks"] is within["ip_adapter_masks"]
        assert part["scale"] is within["scale"]
    # an argument that is shared is split in its pictures alone
    assert shared["gligen"] is within["gligen"]
    assert split["gligen"].tolist() == [1.0]
    assert within["ip_hidden_states"][0] is pictures


def test_several_pictures_of_a_row_stand_together():
    pictures, alone = torch.arange(6.0).reshape(6, 1), torch.zeros(1, 1)
    within = {"image_embeds": (pictures, [alone])}
    changed = take_arguments({"added_cond_kwargs": within}, [2, 0], 3, FLUX)
    first, (second,) = changed["added_cond_kwargs"]["image_embeds"]
    assert first[:, 0].tolist() == [4.0, 5.0, 0.0, 1.0]
    assert second is alone


def test_several_pictures_of_a_row_stay_together():
    pictures = torch.arange(6.0)[:, None]
    within = {"image_embeds": [pictures, pictures[:2], pictures[:5]]}
    (three, one, other) = take_arguments({"added": within}, [1], 2, FLUX)["added"]["image_embeds"]
    assert three.flatten().tolist() == [3.0, 4.0, 5.0]
    assert one.flatten().tolist() == [1.0]
    assert len(other) == 5  # five for two rows: no row's own


def test_a_list_is_a_batch_only_where_the_family_says_so():
    rows = [torch.full((2,), float(i)) for i in range(3)]
    plain = take_arguments({"x": rows}, [2, 0], 3, FLUX)["x"]
    assert [len(row) for row in plain] == [2, 2, 2]
    batch = take_arguments({"x": rows}, [2, 0], 3, replace(FLUX, lists=True))["x"]
    assert [row[0].item() for row in batch] == [2.0, 0.0]


def test_stacking_a_batch_on_itself_undoes_taking_a_half():
    value = {"a": (STATES, [STATES]), "b": torch.zeros(5), "c": "text", "d": torch.tensor(1.0)}
    twice = doubled(value, 2)
    assert twice["a"][0].shape == (4, 3, 4)
    assert twice["b"] is value["b"]
    assert (twice["c"], twice["d"]) == (value["c"], value["d"])
    for half in ([0, 1], [2, 3]):
        assert torch.equal(take(twice, half, 4)["a"][1][0], STATES)


@pytest.mark.parametrize(
    "output",
    [
        STATES,
        (STATES, "more"),
        UNet2DConditionOutput(sample=STATES),
        list(STATES),
        (list(STATES),),
    ],
)
def test_a_prediction_goes_back_into_its_container(output):
    assert torch.equal(prediction_of(output), STATES)
    changed = with_prediction(output, STATES + 1)
    assert type(changed) is type(output)
    assert torch.equal(prediction_of(changed), STATES + 1)
    assert torch.equal(prediction_of(output), STATES)
    if isinstance(output, tuple):
        assert type(changed[0]) is type(output[0])
        assert changed[1:] == output[1:]


def test_what_is_no_prediction_is_named():
    with pytest.raises(TypeError, match="Expected a tensor from the denoiser; got str"):
        prediction_of(("text",))


def test_names_of_arguments_come_from_the_class_that_spells_them_out():
    class Model:
        def forward(self, sample, timestep, text=None):
            pass

    class Handing(Model):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    assert parameter_names(Model) == parameter_names(Handing) == ("sample", "timestep", "text")
    assert parameter_names(Model, "other") == ()


@pytest.mark.parametrize("form", [torch.stack, list])
def test_halves_of_a_batch_are_compared_by_value(form):
    one, two = torch.zeros(2), torch.ones(2)
    assert halves_equal(form([one, two, one, two]))
    assert not halves_equal(form([one, two, two, one]))
    assert count_rows(form([one, two, one])) == 3
