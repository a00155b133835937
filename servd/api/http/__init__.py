"""The OpenAI-style HTTP front: bodies in, replies and event streams out.

Knows nothing of how tokens are made: everything goes through `servd.api.service`.
"""
