"""S2-Guidance (Chen et al. 2025): away from the same model with a random block left out.

Run: python guidance/s2_guidance.py
"""

import torch

import diffalign as da

pipe = da.load("emoji")
generator = torch.Generator().manual_seed(0)
with da.apply(pipe, da.S2Guidance(5.0, omega=0.25)) as session:
    image = pipe("a red apple", num_inference_steps=20, generator=generator).images[0]
print(session.report())
image.save("s2_guidance.png")
