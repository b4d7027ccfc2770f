"""Everything that is known of each pipeline family; one file per family. Knows diffusers classes by
name only."""
