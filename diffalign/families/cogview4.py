"""CogView4: classifier-free guidance in two calls."""

from diffalign.families.family import Family

COGVIEW4 = Family("cogview4", live_scale=True, pipelines=("CogView4Pipeline",), mode="sequential")
