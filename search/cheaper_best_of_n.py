"""Best-of-N for half: choose among drafts, run only the best ones in full.

Run: python search/cheaper_best_of_n.py
"""

import diffalign as da

pipe = da.load("emoji")
methods = {
    "full": da.BestOfN(8),
    # eight images of 8 steps, then the best one again with all 20
    "steps": da.DraftCommit(da.BestOfN(8), steps=8, commits=1),
    # eight images that stop being guided when guidance has done its work
    "guidance": da.DraftCommit(
        da.BestOfN(8), techniques=(da.AdaptiveGuidance(space="x0", threshold=0.96),), commits=1
    ),
}
for name, method in methods.items():
    result = da.align(
        pipe,
        "a photo of a blue car and a yellow banana",
        method=method,
        reward="emoji-clip",
        judges=("emoji-judge",),
        num_inference_steps=20,
        guidance_scale=1.5,
    )
    print(name, result)
    result.image.save(f"cheaper_best_of_n_{name}.png")
