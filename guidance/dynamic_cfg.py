"""Dynamic CFG (Papalampidi et al. 2025): each step takes the candidate weight that a judge of what
comes out likes best.

Run: python guidance/dynamic_cfg.py
"""

import torch

import diffalign as da

pipe = da.load("emoji")
prompts = ["a red apple and a green clock", "three cats"]
generator = torch.Generator().manual_seed(0)
# any reward judges through the pipeline's decoder; on emoji itself "emoji-alignment" reads the
# latents and costs a thirtieth of that. The candidates are looked up for the model; in the first
# 30% of the steps no judge is reliable, so they keep the default weight.
with da.apply(pipe, da.DynamicCFG(1.5, evaluators=("reward:emoji-clip",), start=0.3)) as session:
    images = pipe(prompts, num_inference_steps=20, generator=generator).images
print(session.report())
for i, image in enumerate(images):
    image.save(f"dynamic_cfg_{i}.png")
