"""Obey a negative prompt without guidance, in one evaluation per step.

At scale 1, and on distilled models, a pipeline ignores its negative prompt. NAG puts it into the
attention layers. Each of 24 prompts names two objects, and the negative prompt the second: a judge
counts the images where it is gone and the first is still there. CFG's negative prompt needs two
evaluations per step.

It prints:

    PLACEHOLDER
"""

import torch

import diffalign as da

pipe, judge = da.load("emoji"), da.load("emoji-judge")
things = ("clock", "dog", "cup", "bird", "chair", "bench", "bus", "pizza")
others = ("cake", "apple", "car")
prompts = [f"a photo of a {thing} and a {other}" for other in others for thing in things]
negatives = [f"a photo of a {other}" for other in others for _ in things]
ways = {
    "the pipeline, scale 1": (1.0, ()),
    "its guidance, scale 3": (3.0, ()),
    "NAG, scale 1": (1.0, (da.NAG(7.0, sigma=(0.0, float("inf"))),)),
}
for name, (scale, techniques) in ways.items():
    noise = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    with da.apply(pipe, *techniques) as session:
        images = pipe(
            prompts,
            negative_prompt=negatives,
            num_inference_steps=20,
            guidance_scale=scale,
            generator=noise,
            output_type="pt",
        ).images
    objects = [
        {detection.name for detection in detections if detection.score > 0.3}
        for detections in judge.detect(images)
    ]
    obeyed = sum(
        thing in seen and other not in seen
        for (other, thing), seen in zip(((o, t) for o in others for t in things), objects)
    )
    print(f"{name}: {session.report().nfe:g} evaluations per image, {obeyed} of 24 obeyed")
