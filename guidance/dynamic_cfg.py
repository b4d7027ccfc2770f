"""Dynamic CFG (Papalampidi et al. 2025): each step takes the candidate weight that a judge of the denoised image likes best.

Run: python guidance/dynamic_cfg.py
"""

import torch

import diffalign as da

pipe = da.load("emoji")
prompt = "a red apple and a green clock"


def decode(latents):
    """Denoised latents -> images in [0, 1]."""
    return (pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


judge = da.DecodedReward(decode, da.rewards.load("emoji-clip"), [prompt])
generator = torch.Generator().manual_seed(0)
# judges that were trained on clean images are unreliable at high noise: keep the default weight for the first 30% of the steps
with da.apply(pipe, da.DynamicCFG(5.0, candidates=(1.0, 3.0, 5.0, 7.5, 11.0), evaluators=(judge,), start=0.3)) as session:
    image = pipe(prompt, num_inference_steps=20, generator=generator).images[0]
print(session.report())
image.save("dynamic_cfg.png")
