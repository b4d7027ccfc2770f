"""TCFG (Kwon et al. 2025): only the part of the unconditional prediction that both predictions
share is used.

Run: python guidance/tcfg.py
"""

import torch

import diffalign as da

pipe = da.load("emoji")
generator = torch.Generator().manual_seed(0)
with da.apply(pipe, da.TCFG(5.0)) as session:
    image = pipe("a red apple", num_inference_steps=20, generator=generator).images[0]
print(session.report())
image.save("tcfg.png")
