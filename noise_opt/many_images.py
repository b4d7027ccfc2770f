"""A law of start noise for one prompt: learned once, then every image costs one run.

Run: python noise_opt/many_images.py
"""

import torch

import diffalign as da

pipe = da.load("emoji-turbo")
prompt, call = "a photo of three cups", {"num_inference_steps": 1, "guidance_scale": 1.0}
result = da.align(
    pipe, prompt, method=da.FIND(iterations=30, batch=8, rate=0.05), reward="emoji-aware", **call
)
print(result)

reward, seeds = da.rewards.load("emoji-aware"), range(100, 108)
laws = {
    "learned": da.NoisePolicy.of(result.findings),
    "normal": da.NoisePolicy(torch.zeros_like(result.noise), torch.ones_like(result.noise)),
}
for name, law in laws.items():
    images = pipe([prompt] * 8, latents=law.draw(seeds), output_type="pt", **call).images
    print(name, float(reward(images, [prompt] * 8).mean()))
    row = torch.cat(list(images), dim=2)
    picture = pipe.image_processor.postprocess(2 * row[None] - 1)[0]
    picture.save(f"many_images_{name}.png")
