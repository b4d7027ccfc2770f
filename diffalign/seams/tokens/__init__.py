"""Seam 2: the image tokens, some of which a denoiser call may leave out."""

# loaded with the room: a saved run may hold its states before anything has run
from diffalign.seams.tokens.memory import Memory, TokenStates

__all__ = ["Memory", "TokenStates"]
