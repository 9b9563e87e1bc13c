"""Step 1: from raw videos to a few-step causal student; and the embedded base from nothing."""
