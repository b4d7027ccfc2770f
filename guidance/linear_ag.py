"""LinearAG (Castillo et al. 2023): some unconditional predictions are estimated from earlier ones by a fitted policy.

Run: python guidance/linear_ag.py
"""

import torch

import diffalign as da
from diffalign.guidance.fit import fit_linear_ag

pipe = da.load("emoji")
# a policy belongs to one model, scheduler, number of steps, scale and size; the paper fits 200 trajectories
things = ("apple", "clock", "car", "dog", "cup", "banana", "bird", "chair")
policy = fit_linear_ag(pipe, [f"a red {thing}" for thing in things], scale=5.0, steps=20, batch=8)
policy.save("emoji-policy")
generator = torch.Generator().manual_seed(0)
with da.apply(pipe, da.LinearAG(policy="emoji-policy")) as session:
    image = pipe("a green clock", num_inference_steps=20, generator=generator).images[0]
print(session.report())
image.save("linear_ag.png")
