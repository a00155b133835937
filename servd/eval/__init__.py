"""Measurements of quality, offline: what a setting costs in perplexity and in equal answers.

Knows nothing of serving.
"""
