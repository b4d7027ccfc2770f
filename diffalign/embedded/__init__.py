"""Models that ship with the package, the small world they live in, and the scripts that trained them."""
