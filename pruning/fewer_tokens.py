"""The same image for less: a share of the image tokens, beside fewer steps of the same cost.

    python pruning/fewer_tokens.py [--model FOLDER] [--prompt "a red apple"] [--keep 0.3]

Without a model the weights are random: what is saved is real, the images are noise.
"""

import argparse

import torch

import diffalign as da
from diffalign.testing import tiny_inputs, tiny_pipeline

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="")
parser.add_argument("--prompt", default="a red apple and a green clock")
parser.add_argument("--keep", type=float, default=0.3)
parser.add_argument("--steps", type=int, default=28)
options = parser.parse_args()

if options.model:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(options.model, torch_dtype=torch.bfloat16)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
else:
    pipe = tiny_pipeline("StableDiffusion3Pipeline")


def image(steps, *techniques):
    inputs = {"prompt": options.prompt, "generator": torch.Generator().manual_seed(7)}
    if not options.model:
        inputs = tiny_inputs("StableDiffusion3Pipeline")
    with da.apply(pipe, *techniques) as session:
        return pipe(**{**inputs, "num_inference_steps": steps, "output_type": "pt"}).images, session


full, _ = image(options.steps)
pruned, session = image(options.steps, da.CAT(options.keep))
facts = session.report().pruning.get("CAT")
if facts is None or facts["operations"] == facts["operations_of_all"]:
    raise SystemExit(
        "Every token was computed: CAT leaves some out from step 8 on, and --keep 1 is off."
    )
share = facts["operations"] / facts["operations_of_all"]
fewer, _ = image(max(1, round(share * options.steps)))
print(session.report())
for name, result in (("CAT", pruned), ("fewer steps", fewer)):
    error = (result.float() - full.float()).square().mean()
    print(f"{name}: PSNR to the full run {-10 * float(error.log10()):.1f} dB")
