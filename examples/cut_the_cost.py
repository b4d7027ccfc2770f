"""Cut the cost: the same images for a third fewer evaluations of the denoiser.

Eight prompts are drawn three ways from the same noise, and a judge counts the right images.
AdaptiveGuidance decides for each image when guidance has done its work. LinearAG replaces
evaluations by a combination of earlier ones, which was fitted to this model.

It prints:

    plain guidance: 40 evaluations per image, 5 of 8 right
    AdaptiveGuidance: 25.75 evaluations per image, 5 of 8 right
    LinearAG: 25 evaluations per image, 5 of 8 right
"""

import torch

import diffalign as da
from diffalign.tasks.geneval.verdict import parse_prompt, verdict

pipe, judge = da.load("emoji"), da.load("emoji-judge")
prompts = [
    "a photo of a red car",
    "a photo of a blue clock",
    "a photo of two dogs",
    "a photo of three cups",
    "a photo of an apple and a banana",
    "a photo of a cat and a chair",
    "a photo of a green apple and a red bench",
    "a photo of a yellow bird and a blue car",
]
ways = {
    "plain guidance": (),
    "AdaptiveGuidance": (da.AdaptiveGuidance(),),
    "LinearAG": (da.LinearAG(),),
}
for name, techniques in ways.items():
    noise = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    with da.apply(pipe, *techniques) as session:
        images = pipe(
            prompts,
            num_inference_steps=20,
            guidance_scale=3.0,
            generator=noise,
            output_type="pt",
        ).images
    verdicts = [
        verdict(parse_prompt(prompt), objects, judge.thresholds)
        for prompt, objects in zip(prompts, judge.detect(images), strict=True)
    ]
    right = sum(verdict.correct for verdict in verdicts)
    print(f"{name}: {session.report().nfe:g} evaluations per image, {right} of 8 right")
