"""Seam 3: a trajectory in segments, each an ordinary call of the unmodified pipeline."""
