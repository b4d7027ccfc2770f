"""Scripts that trained the embedded models, and their reports. Nothing imports this room."""
