"""Who runs in the next step, and how many tokens of each. Knows nothing of tensors, text or processes."""
