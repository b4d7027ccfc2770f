"""Seam 2: the image tokens, some of which a denoiser call may leave out."""
