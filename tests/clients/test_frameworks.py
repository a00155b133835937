"""langchain-openai, litellm and instructor, each with what it is used for."""

from __future__ import annotations

import os
from typing import Literal

import instructor
import openai
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, ConfigDict, Field

from tests.clients.conftest import KEY, MODEL, Server

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no download
import litellm


class City(BaseModel):
    """A city."""

    model_config = ConfigDict(extra="forbid")  # else the schema allows endless further fields
    name: Literal["Lisbon", "Oslo"] = Field(description="of the city")
    districts: int = Field(ge=1, le=99)


@tool
def get_weather(city: Literal["Lisbon", "Oslo"]) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def langchain(server: Server, **options: object) -> ChatOpenAI:
    return ChatOpenAI(base_url=server.openai_url, api_key=KEY, model=MODEL, max_retries=0, temperature=0, **options)


def test_langchain_invokes_and_streams(server: Server) -> None:
    chat = langchain(server, max_completion_tokens=30)
    whole = chat.invoke([HumanMessage("Name a city.")])
    streamed = list(chat.stream([HumanMessage("Name a city.")], stream_usage=True))
    assert whole.content
    assert "".join(chunk.text for chunk in streamed) == whole.text
    assert whole.usage_metadata["output_tokens"] > 0


def test_langchain_fills_a_model_by_each_of_its_methods(server: Server) -> None:
    chat = langchain(server, max_completion_tokens=200)
    for method in ("json_schema", "function_calling"):
        city = chat.with_structured_output(City, method=method).invoke("A city, please.")
        assert isinstance(city, City), method


def test_langchain_calls_a_tool(server: Server) -> None:
    chat = langchain(server, max_completion_tokens=200).bind_tools([get_weather], tool_choice="required")
    message = chat.invoke("How is the weather in Oslo?")
    assert message.tool_calls[0]["name"] == "get_weather"
    assert get_weather.invoke(message.tool_calls[0]["args"]).startswith("sunny in ")


def test_langchain_embeds(server: Server) -> None:
    embeddings = OpenAIEmbeddings(
        base_url=server.openai_url, api_key=KEY, model=MODEL, check_embedding_ctx_length=False, max_retries=0
    )
    assert len(embeddings.embed_documents(["a", "b"])) == 2


def test_litellm(server: Server) -> None:
    options = {
        "model": f"openai/{MODEL}", "api_base": server.openai_url, "api_key": KEY, "max_tokens": 20, "temperature": 0,
        "messages": [{"role": "user", "content": "Name a city."}],
    }  # fmt: skip
    whole = litellm.completion(**options)
    streamed = litellm.completion(stream=True, **options)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == whole.choices[0].message.content != ""


def test_litellm_in_anthropics_dialect(server: Server) -> None:
    reply = litellm.completion(
        model=f"anthropic/{MODEL}", api_base=server.url, api_key=KEY, max_tokens=20,
        messages=[{"role": "user", "content": "Name a city."}],
    )  # fmt: skip
    assert reply.choices[0].message.content


def test_instructor_fills_a_model_in_each_mode(server: Server) -> None:
    plain = openai.OpenAI(base_url=server.openai_url, api_key=KEY, max_retries=0)
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(plain, mode=mode)
        city = client.chat.completions.create(
            model=MODEL, response_model=City, max_retries=0, max_tokens=200,
            messages=[{"role": "user", "content": "Give me a city."}],
        )  # fmt: skip
        assert isinstance(city, City), mode
