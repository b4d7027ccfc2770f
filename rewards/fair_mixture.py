"""Two rewards in fair shares, and a judge that neither of them sees.

Run: python rewards/fair_mixture.py
"""

import torch

import diffalign as da

pipe, prompt = da.load("emoji"), "a photo of a red apple and a green clock"
# 16 usual images say how far each reward's scores spread; 32 or more are better
usual = [
    pipe(prompt, num_inference_steps=10, guidance_scale=1.5, output_type="pt",
         generator=torch.Generator().manual_seed(seed)).images
    for seed in range(16)
]  # fmt: skip
images = torch.cat(usual)
mixture = da.rewards.Weighted.measured(
    {"emoji-clip": 1.0, "redness": 0.3}, images, [prompt] * len(images)
)
result = da.align(
    pipe,
    prompt,
    method=da.BestOfN(8),
    reward=mixture,
    # reported, and refused where somebody would optimise it
    judges=[da.rewards.HeldOut("emoji-judge")],
    num_inference_steps=10,
    guidance_scale=1.5,
)
print(result)
result.image.save("fair_mixture.png")
