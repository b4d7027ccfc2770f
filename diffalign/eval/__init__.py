"""Evaluation: how techniques are measured and compared. Importing this package loads nothing."""
