"""CFG++ (Chung et al. 2024): lam in [0, 1] instead of a scale; needs a first-order sampler.

Run: python guidance/cfg_plus_plus.py
"""

import torch
from diffusers import DDIMScheduler

import diffalign as da

pipe = da.load("emoji")
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
generator = torch.Generator().manual_seed(0)
with da.apply(pipe, da.CFGPlusPlus(0.6)) as session:
    image = pipe("a red apple", num_inference_steps=20, generator=generator).images[0]
print(session.report())
image.save("cfg_plus_plus.png")
