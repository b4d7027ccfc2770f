"""Samplers over tiny pipelines, for every test of this room."""

import diffusers
import pytest

from diffalign.seams.trajectory.sampler import PipelineSampler
from diffalign.testing import tiny_inputs, tiny_pipeline

SET = ("generator", "latents", "output_type", "return_dict")


@pytest.fixture
def sampler_for():
    """``sampler_for(name, *techniques, scheduler=, kernel=, ...)``: a sampler of one prompt."""

    def make(name, *techniques, scheduler=None, text=False, steps=4, options=None, batch=1, **rest):
        dtype = {"dtype": rest.pop("dtype")} if "dtype" in rest else {}
        pipe = tiny_pipeline(name, text=text, **dtype)
        if scheduler is not None:
            cls = getattr(diffusers, scheduler)
            pipe.scheduler = cls.from_config(pipe.scheduler.config, **options or {})
        call = tiny_inputs(name, text=text, steps=steps, batch=batch, **dtype)
        call = {key: value for key, value in call.items() if key not in SET}
        kernel, meter, tiny = (rest.pop(key, None) for key in ("kernel", "meter", "tiny"))
        return PipelineSampler(pipe, techniques, meter, kernel, tiny, **call | rest)

    return make
