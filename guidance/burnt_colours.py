"""A high guidance scale without burnt colours and halos.

Run: python guidance/burnt_colours.py
"""

import torch

import diffalign as da

pipe = da.load("emoji")
techniques = {
    "plain": da.CFG(5.0),
    # leaves out what only makes the image stronger, not better
    "projected": da.APG(5.0),
    # brings the prediction's deviation back to the conditional model's
    "rescaled": da.RescaledCFG(5.0, phi=0.7),
}
for name, technique in techniques.items():
    generator = torch.Generator().manual_seed(0)
    with da.apply(pipe, technique) as session:
        image = pipe(
            "a photo of a purple scissors",
            num_inference_steps=20,
            guidance_scale=5.0,
            generator=generator,
        ).images[0]
    print(session.report())
    image.save(f"burnt_colours_{name}.png")
