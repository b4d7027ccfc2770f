"""PLADIS (Kim and Sim 2025): text attention extrapolated from softmax towards a sparse map, without
another pass.

Run: python guidance/pladis.py
"""

import torch

import diffalign as da

pipe = da.load("emoji")
generator = torch.Generator().manual_seed(0)
with da.apply(pipe, da.CFG(), da.PLADIS(strength=2.0, branches="cond")) as session:
    image = pipe(
        "a photo of a red apple and a green clock",
        num_inference_steps=20,
        guidance_scale=1.5,
        generator=generator,
    ).images[0]
print(session.report())
image.save("pladis.png")
