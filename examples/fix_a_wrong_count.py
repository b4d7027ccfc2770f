"""Fix a wrong count by search: best-of-N with a reward, checked by a judge that was not optimised.

The first image has the wrong number of clocks. Other noise is tried within a budget of 320
evaluations, a reward chooses, and a judge of another family says whether the count is right. The
result is that of one plain call: its seed makes it again.

It prints:

    first image: expected clock<3, found 3
    result: right
    7 images, 320 evaluations
"""

import diffalign as da
from diffalign.tasks.geneval.verdict import parse_prompt, verdict

pipe, judge = da.load("emoji"), da.load("emoji-judge")
prompt = "a photo of two clocks"
result = da.align(
    pipe,
    prompt,
    method=da.BestOfN(),
    reward="emoji-clip",
    budget=da.Budget(nfe=320),
    num_inference_steps=20,
    guidance_scale=3.0,
)
images = {"first image": result.first.image, "result": result.tensor}
for name, image in images.items():
    (objects,) = judge.detect(image[None])
    answer = verdict(parse_prompt(prompt), objects, judge.thresholds)
    print(f"{name}: {'right' if answer.correct else answer.reason}")
print(f"{result.scored} images, {result.ledger.nfe} evaluations")
result.save("fix_a_wrong_count")
