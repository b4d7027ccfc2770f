"""Seam 2: the attention layers."""
