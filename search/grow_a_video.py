"""A video chunk by chunk: weak beginnings are dropped before the model's time goes into them.

Run: python search/grow_a_video.py
"""

import diffalign as da
from diffalign.drawing.video import save_gif

pipe = da.load("emoji-video")
pipe.set_progress_bar_config(disable=True)
methods = {
    "linear": da.LinearSearch(6),
    # six first chunks, two stay; two second chunks of each, two stay; then one of each
    "tree": da.TreeOfFrames(branch=(6, 2, 1), keep=(2,)),
}
for name, method in methods.items():
    result = da.align(
        pipe,
        "a photo of a dog moving left and a red apple",
        method=method,
        # what is optimised is never the judge
        reward="emoji-story",
        judges=("emoji-story:judge=emoji-judge-audit",),
        num_inference_steps=6,
        guidance_scale=3.0,
        num_frames=13,
        height=64,
        width=64,
        max_sequence_length=24,
    )
    print(name, result)
    save_gif(result.frames, f"grow_a_video_{name}.gif")
    result.frames[-1].save(f"grow_a_video_{name}.png")
