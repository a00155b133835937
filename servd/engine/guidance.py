"""Grammars that an answer must follow, as the text that the worker compiles (llguidance's serialized form).

Owns the building of that text. Knows nothing of requests; importing it does not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

ANY_JSON_OBJECT: Mapping[str, Any] = {"type": "object"}


def from_json_schema(schema: Mapping[str, Any]) -> str:
    """Answers are JSON texts that follow `schema`."""
    return json.dumps({"grammars": [{"json_schema": schema}]})


def from_regex(pattern: str) -> str:
    """Answers match `pattern` as a whole."""
    return json.dumps({"grammars": [{"lark_grammar": f"start: /{pattern.replace('/', chr(92) + '/')}/"}]})


def from_choice(texts: Sequence[str]) -> str:
    """Answers are one of `texts`."""
    alternatives = " | ".join(json.dumps(text) for text in texts)
    return json.dumps({"grammars": [{"lark_grammar": f"start: {alternatives}"}]})


def from_lark(grammar: str) -> str:
    """Answers follow a grammar in llguidance's Lark dialect."""
    return json.dumps({"grammars": [{"lark_grammar": grammar}]})
