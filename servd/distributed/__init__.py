"""Groups of ranks that compute one model together.

Knows torch.distributed alone, nothing of servd.
"""
