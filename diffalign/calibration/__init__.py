"""Offline tools that fit a technique to a model: curves, thresholds, linear policies."""
