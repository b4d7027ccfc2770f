"""Skip-layer guidance (Stability AI 2024, with SD3.5 medium): away from the same model without
chosen blocks, at the early steps.

Run: python guidance/skip_layer_guidance.py
"""

import torch
from PIL import Image

import diffalign as da
from diffalign.seams.blocks.sites import sites

pipe = da.load("emoji")
# SD3.5 medium has published layers, and layers=None takes them; elsewhere look first: plain
# guidance, then one image for each block
blocks = [site.name for site in sites(pipe.unet) if site.edge is None]
skips = [
    da.SkipLayerGuidance(5.0, layers=(block,), slg_scale=2.8, start=0.0, stop=0.4)
    for block in blocks
]
images = []
for technique in (da.CFG(5.0), *skips):
    generator = torch.Generator().manual_seed(0)
    with da.apply(pipe, technique) as session:
        images += pipe(
            "a red apple and a green clock", num_inference_steps=20, generator=generator
        ).images
print(session.report())
sheet = Image.new("RGB", (sum(image.width for image in images), images[0].height))
for i, image in enumerate(images):
    sheet.paste(image, (i * image.width, 0))
sheet.save("skip_layer_guidance.png")
