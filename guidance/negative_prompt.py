"""Something removed from an image by a negative prompt, with guidance and without.

Run: python guidance/negative_prompt.py
"""

import torch

import diffalign as da

pipe = da.load("emoji")
negative = "a photo of a cake"
techniques = {
    # two evaluations per step: away from the negative prompt
    "guidance": (da.CFG(3.0), 3.0),
    # one evaluation per step: scale 1 switches guidance off, and the negative text acts inside the
    # attention layers; the published window stops early, every step removes more on this model
    "attention": (da.NAG(5.0, sigma=(0.0, float("inf"))), 1.0),
}
for name, (technique, scale) in techniques.items():
    # one of the seeds where it works: on this model about one image in seven
    generator = torch.Generator().manual_seed(9)
    with da.apply(pipe, technique) as session:
        image = pipe(
            "a photo of a hair drier and a cake",
            negative_prompt=negative,
            num_inference_steps=20,
            guidance_scale=scale,
            generator=generator,
        ).images[0]
    print(session.report())
    image.save(f"negative_prompt_{name}.png")
