"""The embedded networks: judges, dual encoder, evaluator."""
