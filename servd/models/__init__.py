"""Model families, one file each, and the loader that fills them from files.

Knows nothing of requests, blocks or sampling; the contract is in `base`.
"""
