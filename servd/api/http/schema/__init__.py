"""The bodies of the generating endpoints, field by field: honoured, without effect, or refused by name.

A module an endpoint, over the fields that all share. Knows nothing of tokens or engines.
"""

from servd.api.http.schema.chat import ChatCompletionRequest
from servd.api.http.schema.checks import renamed
from servd.api.http.schema.completions import CompletionRequest
from servd.api.http.schema.generation import GenerationRequest, StreamOptions

__all__ = ["ChatCompletionRequest", "CompletionRequest", "GenerationRequest", "StreamOptions", "renamed"]
