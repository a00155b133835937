"""The form that an answer must have, as the grammar that the engine follows.

Knows nothing of how a dialect asks for it.
"""

from __future__ import annotations

from servd.api.chat.call import AnswerFormat
from servd.engine import guidance
from servd.errors import InvalidRequestError


def grammar_of(answer_format: AnswerFormat) -> str:
    """The text for SamplingParams.guidance. Raises InvalidRequestError for a choice of nothing."""
    value = answer_format.value
    match answer_format.kind:
        case "json_object":
            return guidance.from_json_schema(guidance.ANY_JSON_OBJECT)
        case "json_schema":
            return guidance.from_json_schema(value)
        case "regex":
            return guidance.from_regex(value)
        case "choice":
            if not value or not all(value):
                raise InvalidRequestError(
                    f"{answer_format.param} holds no text, or an empty one; allowed: texts, at least one",
                    param=answer_format.param,
                )
            return guidance.from_choice(value)
        case "grammar":
            return guidance.from_lark(value)
