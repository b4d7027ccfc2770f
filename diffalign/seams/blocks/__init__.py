"""Seam 2: the transformer blocks."""
