"""Obey a negative prompt at scale 1, in one evaluation per step.

Without guidance, and on distilled models, a pipeline ignores its negative prompt. NAG puts it into
the attention layers. Twelve objects are drawn in the colour that the model likes; then that colour
is the negative prompt, and a judge counts the images that have the object in another one.

It prints:

    the pipeline, scale 1: 20 evaluations per image, 0 of 12 obeyed
    its guidance, scale 3: 40 evaluations per image, 4 of 12 obeyed
    NAG, scale 1: 20 evaluations per image, 3 of 12 obeyed
"""

import torch

import diffalign as da

pipe, judge = da.load("emoji"), da.load("emoji-judge")
things = ("car", "clock", "apple", "banana", "bird", "chair")
things += ("cup", "bus", "umbrella", "kite", "suitcase", "bowl")
prompts = [f"a photo of a {thing}" for thing in things]


def draw(scale, negatives, *techniques):
    """What the judge sees in each image, object -> colour, and the evaluations of an image."""
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
    answers = judge.detect(images)
    looks = [{d.name: d.colour for d in each[::-1] if d.score > 0.3} for each in answers]
    return looks, session.report().nfe


plain, _ = draw(1.0, None)
colours = [look.get(thing) for look, thing in zip(plain, things, strict=True)]
negatives = [f"a photo of a {colour} {thing}" for colour, thing in zip(colours, things)]
ways = {
    "the pipeline, scale 1": (1.0, ()),
    "its guidance, scale 3": (3.0, ()),
    "NAG, scale 1": (1.0, (da.NAG(7.0, sigma=(0.0, float("inf"))),)),
}
for name, (scale, techniques) in ways.items():
    images, nfe = draw(scale, negatives, *techniques)
    rows = zip(images, things, colours, strict=True)
    obeyed = sum(look.get(thing) not in (None, colour) for look, thing, colour in rows)
    print(f"{name}: {nfe:g} evaluations per image, {obeyed} of 12 obeyed")
