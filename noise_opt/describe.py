"""A prompt of a few tokens that says what an image shows, and the image made again from it.

Run: python noise_opt/describe.py
"""

import torch

import diffalign as da

pipe, call = da.load("emoji"), {"num_inference_steps": 10, "guidance_scale": 3.0}
secret = "a photo of a blue car"
rng = torch.Generator().manual_seed(1)
pipe(secret, generator=rng, **call).images[0].save("describe_original.png")

# the method sees the image and not its prompt; the reward is what compares texts and images
method = da.PEZ(images=("describe_original.png",), tokens=4, iterations=150, draws=2)
result = da.align(pipe, "an image", method=method, reward="emoji-clip", **call)
print(result)
result.image.save("describe_again.png")
