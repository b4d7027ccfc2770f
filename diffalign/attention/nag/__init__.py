"""Normalised attention guidance: the technique, its negative text, and attention over two texts."""

from diffalign.attention.nag.nag import NAG

__all__ = ["NAG"]
