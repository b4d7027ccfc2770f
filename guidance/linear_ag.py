"""LinearAG (Castillo et al. 2023): some unconditional predictions are estimated from earlier ones
by a fitted policy.

A policy belongs to one model, scheduler, number of steps, scale and size. ``emoji`` ships two, for
scale 1.5 and 20 or 50 steps, which ``da.LinearAG()`` finds; for anything else fit one, here or with
``diffalign fit linear-ag``. Run: python guidance/linear_ag.py
"""

import torch

import diffalign as da
from diffalign.calibration.linear import fit_linear_ag

pipe = da.load("emoji")
things = (
    "apple",
    "clock",
    "car",
    "dog",
    "cup",
    "banana",
    "bird",
    "chair",
)  # the paper fits 200 trajectories
policy = fit_linear_ag(pipe, [f"a red {thing}" for thing in things], scale=2.0, steps=20, batch=8)
policy.save("emoji-policy")
print(
    "share of the guidance that each estimate keeps:",
    {step: round(kept, 3) for step, kept in policy.gain.items()},
)
generator = torch.Generator().manual_seed(0)
with da.apply(pipe, da.LinearAG(policy="emoji-policy")) as session:
    image = pipe("a green clock", num_inference_steps=20, generator=generator).images[0]
print(session.report())
image.save("linear_ag.png")
