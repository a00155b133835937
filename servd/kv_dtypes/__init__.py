"""How keys and values are stored in a KV block: one file a storage type.

Knows nothing of block assignment; the contract is in `base`.
"""
