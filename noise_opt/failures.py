"""Ordinary noise with which the model fails, confirmed by a judge that the search never asked.

Run: python noise_opt/failures.py
"""

import diffalign as da

pipe = da.load("emoji-2")
methods = {
    "latent": da.SAGE(search="latent", iterations=12, confirmations=6),
    "prompt": da.SAGE(search="prompt", rounds=1, seeds=2, candidates=3, beam=2, confirmations=6),
}
for name, method in methods.items():
    result = da.align(
        pipe,
        "a photo of a stop sign",
        method=method,
        reward="emoji-failure",
        num_inference_steps=4,
        guidance_scale=3.0,
    )
    print(name, result)
    print({key: round(value, 2) for key, value in result.log[-1].items()})
    result.image.save(f"failures_{name}.png")
