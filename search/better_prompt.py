"""Another wording of the prompt that the model understands better, and what it gains.

Run: python search/better_prompt.py
"""

import diffalign as da

pipe = da.load("emoji")
# rules write the wordings; rewriter="path/to/a/model" asks a local language model, a function of
# yours is asked as rewriter(original, best, worst, count)
method = da.PromptSearch(strategy="evolve", rewriter="rules", rounds=2, children=3, final=3)


def tell(status):
    print(status.info.text)


result = da.align(
    pipe,
    "a photo of a brown dog and a purple scissors",
    method=method,
    reward="emoji-clip",
    judges=("emoji-judge",),
    show=tell,
    num_inference_steps=10,
    guidance_scale=1.5,
)
print(result)
print("prompt of the image:", result.lineage.prompt or result.prompt)
result.image.save("better_prompt.png")
