"""Which pipelines can extend a video."""

import diffusers
import pytest

from diffalign.core import UnsupportedModel
from diffalign.families import FAMILIES
from diffalign.search.video.choice import EXPANDERS, expander_class, expander_of
from diffalign.search.video.last_frame import LastFrame
from diffalign.search.video.wan_vace import WanVACE
from diffalign.testing.tiny import tiny_pipeline

NAMES = [name for expander in EXPANDERS for name in expander.pipelines]


def test_each_class_has_one_expander():
    assert len(set(NAMES)) == len(NAMES)
    there = [name for name in NAMES if hasattr(diffusers, name)]
    assert there == NAMES  # the oldest diffusers that is supported has them all
    for name in there:
        assert name in expander_class(getattr(diffusers, name)).pipelines


def test_every_image_to_video_pipeline_of_the_registry_can_be_chained():
    chained = {name for name in FAMILIES if "ImageToVideo" in name}
    assert chained
    assert chained <= set(LastFrame.pipelines)


def test_a_subclass_and_an_unknown_class():
    class Mine(diffusers.WanVACEPipeline):
        pass

    assert expander_class(Mine) is WanVACE
    with pytest.raises(UnsupportedModel) as error:
        expander_of(tiny_pipeline("StableDiffusionPipeline"), prompt="a")
    assert "StableDiffusionPipeline cannot extend a video" in str(error.value)
    assert all(name in str(error.value) for name in NAMES)
    assert "\n" not in str(error.value)
