"""Models by name, and the one sampling loop."""
