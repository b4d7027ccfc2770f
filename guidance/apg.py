"""Adaptive projected guidance (Sadat et al. 2024): high scales without over-saturation.

Run: python guidance/apg.py
"""

import torch

import diffalign as da

pipe = da.load("emoji")
generator = torch.Generator().manual_seed(0)
# cap and momentum depend on the latent: these are the paper's for Stable Diffusion 2.1; leave them
# out to use the model's preset
with da.apply(pipe, da.APG(10.0, eta=0.0, cap=7.5, momentum=-0.75)) as session:
    image = pipe("a red apple", num_inference_steps=20, generator=generator).images[0]
print(session.report())
image.save("apg.png")
