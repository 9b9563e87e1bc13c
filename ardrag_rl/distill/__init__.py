"""Step 1: from nothing to a few-step causal base."""
