"""Contact sheets, charts and settings inside PNG files."""
