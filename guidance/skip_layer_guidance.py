"""Skip-layer guidance: away from the same model without chosen blocks.

Run: python guidance/skip_layer_guidance.py
"""

import torch

import diffalign as da

pipe = da.load("emoji")
generator = torch.Generator().manual_seed(0)
with da.apply(pipe, da.SkipLayerGuidance(5.0, layers=("*",), slg_scale=1.0)) as session:
    image = pipe("a red apple", num_inference_steps=20, generator=generator).images[0]
print(session.report())
image.save("skip_layer_guidance.png")
