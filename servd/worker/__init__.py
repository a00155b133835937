"""The data plane's top: a worker holds a model and a KV cache, and turns plans into tokens.

Knows nothing of scheduling, text or transports.
"""
