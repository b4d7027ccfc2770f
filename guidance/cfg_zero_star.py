"""CFG-Zero* (Fan et al. 2025), for flow models: an optimised scale of the unconditional velocity,
and a still first step.

Run: python guidance/cfg_zero_star.py
"""

import diffalign as da
from diffalign.testing import tiny_inputs, tiny_pipeline

# random weights show the calls and their cost; with StableDiffusion3Pipeline.from_pretrained(...)
# the lines below are the same
pipe = tiny_pipeline("StableDiffusion3Pipeline")
with da.apply(pipe, da.CFGZeroStar(zero_steps=1)) as session:
    pipe(**tiny_inputs("StableDiffusion3Pipeline", steps=8))
print(session.report())
