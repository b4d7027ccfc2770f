"""Gradients against chance: the same number of images, three ways.

Run: python noise_opt/climb.py
"""

import diffalign as da

pipe = da.load("emoji")
# two rewards; CARINOX clips the gradient of each, ReNO follows their weighted sum
reward = da.rewards.Weighted({"emoji-clip": 1.0, "emoji-judge": 0.02})
methods = {
    "chance": da.RandomSearch(noises=8),
    "reno": da.ReNO(iterations=8),
    "carinox": da.CARINOX(starts=2, iterations=4),
}
for name, method in methods.items():
    result = da.align(
        pipe,
        "a photo of a red apple and a green clock",
        method=method,
        reward=reward,
        num_inference_steps=3,
        guidance_scale=3.0,
    )
    print(name, result)
    result.image.save(f"climb_{name}.png")
