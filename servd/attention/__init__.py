"""Attention over the paged KV cache: what a batch looks like, and the layer that computes it.

Knows nothing of models, or of how blocks were assigned.
"""
