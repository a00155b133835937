"""The Open Inference Protocol (KServe v2, with Triton's extensions), transport-neutral: tensors in, tensors out.

Knows nothing of protobuf, JSON bodies or SSE; gRPC and HTTP turn those into an `InferRequest`.
"""
