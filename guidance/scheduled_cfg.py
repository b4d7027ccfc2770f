"""Guidance that grows over the steps (Wang et al. 2024): the mean weight stays 5.

Run: python guidance/scheduled_cfg.py
"""

import torch

import diffalign as da

pipe = da.load("emoji")
generator = torch.Generator().manual_seed(0)
# other shapes: linear, inverse-linear, sine, v, lambda, interval (band=...), pcs (power=...)
with da.apply(pipe, da.ScheduledCFG(5.0, shape="cosine", normalise=True)) as session:
    image = pipe("a red apple", num_inference_steps=20, generator=generator).images[0]
print(session.report())
image.save("scheduled_cfg.png")
