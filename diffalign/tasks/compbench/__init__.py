"""T2I-CompBench++: prompts and rules (Huang et al. 2023, arXiv:2307.06350; 2025, IEEE TPAMI)."""
