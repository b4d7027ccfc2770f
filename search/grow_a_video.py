"""A video chunk by chunk: weak beginnings are dropped before the model's time goes into them.

Run: python search/grow_a_video.py
"""

import diffalign as da
from diffalign.drawing.video import save_gif
from diffalign.testing import tiny_pipeline

# Random weights, for a CPU and a minute: what counts here is the cost. For videos worth looking at
# put diffusers' AnyFlowFARPipeline.from_pretrained(...) here, and its own sizes and steps below.
pipe = tiny_pipeline("AnyFlowFARPipeline", text=True)
pipe.set_progress_bar_config(disable=True)
methods = {
    "linear": da.LinearSearch(6),
    # six first chunks, two stay; two second chunks of each, two stay; then one of each
    "tree": da.TreeOfFrames(branch=(6, 2, 1), keep=(2,)),
}
for name, method in methods.items():
    result = da.align(
        pipe,
        "a dog moving left",
        method=method,
        reward="frames:reward=redness",
        judges=("flicker", "motion-smoothness"),
        num_inference_steps=2,
        guidance_scale=1.0,
        height=32,
        width=32,
    )
    print(name, result)
    save_gif(result.frames, f"grow_a_video_{name}.gif")
    result.frames[-1].save(f"grow_a_video_{name}.png")
