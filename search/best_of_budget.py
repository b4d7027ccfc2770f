"""The best image that 200 evaluations buy, by four ways of spending them.

Run: python search/best_of_budget.py
"""

import diffalign as da

pipe = da.load("emoji")
methods = {
    # fresh noise each time; what the others have to beat
    "draws": da.BestOfN(),
    # continue the better of several continuations, twice as many at each step
    "beam": da.Beam(beams=2, children=4, every=5),
    # as many tries at a step as it takes, the rest for later steps
    "rollover": da.RBF(starts=4, quota=3),
    # noise a good image a little and run it again, in several ways
    "paths": da.PathSearch(),
}
for name, method in methods.items():
    result = da.align(
        pipe,
        "a photo of a red apple and a green clock",
        method=method,
        reward="emoji-clip",
        # reported, never optimised
        judges=("emoji-judge",),
        budget=da.Budget(nfe=200),
        # beam and rollover need a sampler that draws noise at every step
        kernel=da.Eta(1.0) if method.branches else None,
        num_inference_steps=20,
        guidance_scale=1.5,
    )
    print(name, result)
    result.image.save(f"best_of_budget_{name}.png")
