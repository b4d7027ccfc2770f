"""Beta-CFG (Malarz et al. 2025): no guidance at both ends, a normalised difference in between.

Run: python guidance/beta_cfg.py
"""

import torch

import diffalign as da

pipe = da.load("emoji")
generator = torch.Generator().manual_seed(0)
# with gamma above 0 the scale counts in norms of the difference, so it does not compare with a CFG
# scale
with da.apply(pipe, da.BetaCFG(5.0, a=2.0, b=2.0, gamma=0.5)) as session:
    image = pipe("a red apple", num_inference_steps=20, generator=generator).images[0]
print(session.report())
image.save("beta_cfg.png")
