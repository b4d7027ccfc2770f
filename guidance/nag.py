"""Normalised attention guidance (Chen et al. 2025): a negative prompt without classifier-free guidance, at one pass per step.

Run: python guidance/nag.py
"""

import torch

import diffalign as da

pipe = da.load("emoji")
generator = torch.Generator().manual_seed(0)
# guidance_scale 1 switches the second pass off; the negative text then acts inside the attention layers only
with da.apply(pipe, da.NAG(negative_prompt="a green clock")) as session:
    image = pipe("a photo of a clock", num_inference_steps=20, guidance_scale=1.0, generator=generator).images[0]
print(session.report())
image.save("nag.png")
