"""The layers that models are built of: each shards, loads and owns its weights.

Knows nothing of models or of files.
"""
