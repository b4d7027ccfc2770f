"""Classifier-free guidance (Ho and Salimans 2022): bit-identical to the pipeline's own.

Run: python guidance/cfg.py
"""

import torch

import diffalign as da

pipe = da.load("emoji")
generator = torch.Generator().manual_seed(0)
with da.apply(pipe, da.CFG(5.0)) as session:
    image = pipe("a red apple", num_inference_steps=20, generator=generator).images[0]
print(session.report())
image.save("cfg.png")
