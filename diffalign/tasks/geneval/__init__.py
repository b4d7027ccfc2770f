"""GenEval: prompts, verdicts and summary (Ghosh, Hajishirzi, Schmidt 2023, arXiv:2310.11513)."""
