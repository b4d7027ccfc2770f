"""MAMBO-G (2025): less guidance where the two predictions differ much, which is at the first steps.

Run: python guidance/magnitude_aware.py
"""

import torch

import diffalign as da

pipe = da.load("emoji")
generator = torch.Generator().manual_seed(0)
with da.apply(pipe, da.MagnitudeAware(10.0, alpha=8.0)) as session:
    image = pipe("a red apple", num_inference_steps=20, generator=generator).images[0]
print(session.report())
image.save("magnitude_aware.png")
