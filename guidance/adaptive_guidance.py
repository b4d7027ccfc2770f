"""Adaptive Guidance (Castillo et al. 2023): stop guiding an image once its two predictions agree.

Run: python guidance/adaptive_guidance.py
"""

import torch

import diffalign as da

pipe = da.load("emoji")
generator = torch.Generator().manual_seed(0)
# the threshold is looked up for the model; the report says which one it was and where it comes from
with da.apply(pipe, da.AdaptiveGuidance(5.0)) as session:
    image = pipe(
        "a red apple and a green clock", num_inference_steps=20, generator=generator
    ).images[0]
print(session.report())
image.save("adaptive_guidance.png")
