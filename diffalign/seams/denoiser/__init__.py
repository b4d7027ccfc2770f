"""Seam 1: the denoiser call."""
