"""OpenAI's Responses: bodies, items, events, and the responses that are kept for later.

Knows nothing of how an answer is generated.
"""
