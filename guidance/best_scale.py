"""The guidance scale of each step chosen by a judge of what comes out: DynamicCFG.

Run: python guidance/best_scale.py
"""

import torch

import diffalign as da

pipe = da.load("emoji")
# any reward judges through the pipeline's decoder; on emoji itself "emoji-alignment" reads the
# latents and costs a thirtieth of that. The candidates are looked up for the model; in the first
# 30% of the steps no judge is reliable, so they keep the default weight.
technique = da.DynamicCFG(3.0, evaluators=("reward:emoji-clip",), start=0.3)
prompts = ["a red apple and a green clock", "three cats"]
generator = torch.Generator().manual_seed(0)
with da.apply(pipe, technique) as session:
    images = pipe(prompts, num_inference_steps=20, guidance_scale=3.0, generator=generator).images
print(session.report())
for i, image in enumerate(images):
    image.save(f"best_scale_{i}.png")
