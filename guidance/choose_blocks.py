"""Away from a weaker copy of the same model, which lacks a block: look which block to leave out.

Run: python guidance/choose_blocks.py
"""

import torch
from PIL import Image

import diffalign as da
from diffalign.seams.blocks.sites import sites

pipe = da.load("emoji")
names = [site.name for site in sites(pipe.unet) if site.edge is None]
# S2Guidance draws another block at each step; then one image for each block. SD3.5 medium has
# published layers, which SkipLayerGuidance() takes there.
techniques = [da.CFG(3.0), da.S2Guidance(3.0)]
techniques += [da.SkipLayerGuidance(3.0, layers=(name,), start=0.0, stop=0.4) for name in names]
images = []
for technique in techniques:
    generator = torch.Generator().manual_seed(0)
    with da.apply(pipe, technique) as session:
        images += pipe(
            "a red apple and a green clock",
            num_inference_steps=20,
            guidance_scale=3.0,
            generator=generator,
        ).images
    print(session.report())
sheet = Image.new("RGB", (sum(image.width for image in images), images[0].height))
for i, image in enumerate(images):
    sheet.paste(image, (i * image.width, 0))
sheet.save("choose_blocks.png")
