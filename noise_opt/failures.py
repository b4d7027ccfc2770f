"""Does the model fail with ordinary noise, or beside other words?

A judge that the search never asked confirms it: ``found`` is 0 where it does not, and ``random`` is
the rate of chance at equal cost.

Run: python noise_opt/failures.py
"""

import diffalign as da

pipe = da.load("emoji")
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
