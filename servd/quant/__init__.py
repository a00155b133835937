"""Weight formats of linear layers: one file a format.

Knows nothing of models or of files on disk; the contract is in `base`.
"""
