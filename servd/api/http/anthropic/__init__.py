"""Anthropic's Messages: bodies, content blocks, events and errors.

Knows nothing of how an answer is generated.
"""
