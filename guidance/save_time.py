"""The same image for fewer evaluations of the denoiser.

Run: python guidance/save_time.py
"""

import torch

import diffalign as da

pipe = da.load("emoji")
techniques = {
    "plain": da.CFG(),
    # guide while the layout forms, then run the conditional model alone
    "interval": da.IntervalCFG(stop=0.5),
    # the same, decided for each image when its two predictions agree
    "adaptive": da.AdaptiveGuidance(),
}
for name, technique in techniques.items():
    generator = torch.Generator().manual_seed(0)
    with da.apply(pipe, technique) as session:
        image = pipe(
            "a photo of a red apple and a green clock",
            num_inference_steps=20,
            guidance_scale=3.0,
            generator=generator,
        ).images[0]
    print(session.report())
    image.save(f"save_time_{name}.png")
