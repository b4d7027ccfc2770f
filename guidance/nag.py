"""Normalised attention guidance (Chen et al. 2025): a negative prompt without classifier-free
guidance, at one pass per step.

Run: python guidance/nag.py
"""

import torch

import diffalign as da

pipe = da.load("emoji")
generator = torch.Generator().manual_seed(
    9
)  # one of the seeds where it works: on this model about one image in seven
# guidance_scale 1 switches the second pass off; the negative text then acts inside the attention
# layers only. The published window stops NAG early; at every step, as here, it removes more on this
# model (benchmarks/results/negation.md).
with da.apply(
    pipe, da.NAG(5.0, negative_prompt="a photo of a cake", sigma=(0.0, float("inf")))
) as session:
    image = pipe(
        "a photo of a hair drier and a cake",
        num_inference_steps=20,
        guidance_scale=1.0,
        generator=generator,
    ).images[0]
print(session.report())
image.save("nag.png")
