"""Conversations as every dialect asks and answers them: tools, reasoning, structured output.

Knows nothing of JSON bodies, protobuf or SSE. HTTP's three chat dialects and gRPC turn their bodies into a `ChatCall`.
"""
