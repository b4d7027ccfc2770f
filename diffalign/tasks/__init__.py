"""Benchmarks as pure functions on plain values: prompts, rules, summaries."""
