"""Guidance at middle noise levels only (Kynkäänniemi et al. 2024): the other steps cost one pass.

Run: python guidance/interval_cfg.py
"""

import torch

import diffalign as da

pipe = da.load("emoji")
generator = torch.Generator().manual_seed(0)
# or as fractions of the steps: da.IntervalCFG(6.0, start=0.2, stop=0.8)
with da.apply(pipe, da.IntervalCFG(6.0, sigma=(0.28, 5.42))) as session:
    image = pipe("a red apple", num_inference_steps=20, generator=generator).images[0]
print(session.report())
image.save("interval_cfg.png")
