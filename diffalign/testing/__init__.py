"""Tools for tests, ours and those of plugin authors: tiny random-weight pipelines of every
supported family.

Nothing here is imported by the library itself.
"""

from diffalign.testing.tiny import tiny_inputs, tiny_names, tiny_pipeline, tiny_unet_pipeline

__all__ = ["tiny_inputs", "tiny_names", "tiny_pipeline", "tiny_unet_pipeline"]
