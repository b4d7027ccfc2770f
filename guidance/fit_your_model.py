"""Fewer evaluations by a policy that is fitted to one model: LinearAG.

A policy belongs to one model, scheduler, number of steps, scale and size. ``emoji`` ships two, for
scale 3 and 20 or 50 steps, which ``da.LinearAG()`` finds. Run: python guidance/fit_your_model.py
"""

import torch

import diffalign as da
from diffalign.calibration.linear import fit_linear_ag

pipe = da.load("emoji")
# the paper fits 200 trajectories; eight show how it goes
things = ("apple", "clock", "car", "dog", "cup", "banana", "bird", "chair")
policy = fit_linear_ag(pipe, [f"a red {thing}" for thing in things], scale=2.0, steps=20, batch=8)
policy.save("emoji-policy")
shares = {step: round(share, 3) for step, share in policy.gain.items()}
print("share of the guidance that each estimate keeps:", shares)
generator = torch.Generator().manual_seed(0)
with da.apply(pipe, da.LinearAG(policy="emoji-policy")) as session:
    image = pipe("a green clock", num_inference_steps=20, generator=generator).images[0]
print(session.report())
image.save("fit_your_model.png")
