"""CFG with the conditional prediction's standard deviation (Lin et al. 2023): against over-exposed
images.

Run: python guidance/rescaled_cfg.py
"""

import torch

import diffalign as da

pipe = da.load("emoji")
generator = torch.Generator().manual_seed(0)
with da.apply(pipe, da.RescaledCFG(7.5, phi=0.7)) as session:
    image = pipe("a red apple", num_inference_steps=20, generator=generator).images[0]
print(session.report())
image.save("rescaled_cfg.png")
