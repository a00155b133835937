"""gRPC front: servd.v1.Inference, the standard health service and reflection.

Stubs in `_pb/` are made from proto/ by kernels/build_backend.py.
"""
