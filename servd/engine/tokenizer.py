"""Text to token ids and back, on the `tokenizers` library; chats through the model's template.

Owns the exact bytes of every token. Knows nothing of requests, and holds no state: all methods are thread-safe.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from servd.engine.chat_template import ChatTemplate, load_chat_template, special_token_text
from servd.errors import ConfigError, InvalidRequestError
from servd.hub.files import ModelFiles

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Stand for special tokens' text that a caller wrote, while the template runs (plane 16, private use).
FIRST_STAND_IN, LAST_STAND_IN = 0x100000, 0x10FFFD


class Tokenizer:
    """A model's tokenizer.

    vocab_size: rows of the model's embedding, which may exceed the tokenizer's own tokens; the rest decode to "".
    eos_token_ids: every id that ends a turn. special_token_ids: left out of text by skip_special_tokens.
    num_stripped_spaces: leading spaces that decode() takes off a text (SentencePiece writes one before the first word).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        vocab_size: int,
        eos_token_ids: Iterable[int] = (),
        bos_token_id: int | None = None,
        chat_template: ChatTemplate | None = None,
        prepend_bos: bool = False,
    ) -> None:
        """`backend` is taken over: its truncation and padding are turned off.

        Raises ConfigError for a decoder whose tokens have no bytes of their own.
        """
        backend.no_truncation()  # a stored truncation would cut prompts in silence
        backend.no_padding()
        self.vocab_size = vocab_size
        self.eos_token_ids = frozenset(eos_token_ids)
        self.bos_token_id = bos_token_id
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(i for i, token in self._added.items() if token.special)
        self._chat_template = chat_template
        # What a chat template says of its model: the names that it looks up, and its text; of none, nothing.
        self.template_variables = frozenset[str]() if chat_template is None else chat_template.variables
        self.template_source = "" if chat_template is None else chat_template.source
        self._prepend_bos = prepend_bos and bos_token_id is not None
        self._to_bytes, self.num_stripped_spaces = _bytes_of_decoder(_state(backend.decoder))
        self._token_bytes: dict[int, bytes] = {}
        self._chat_encoder = _ChatEncoder(backend) if chat_template is not None else None

    @classmethod
    def from_files(cls, files: ModelFiles) -> Tokenizer:
        """The tokenizer of a resolved model. Raises ConfigError naming the file at fault."""
        path = files.folder / "tokenizer.json"
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise ConfigError(f"{path} is not a tokenizer that servd can load: {error}") from None
        config = files.config()
        tokenizer_config = files.optional_json("tokenizer_config.json")
        generation_config = files.optional_json("generation_config.json")
        vocab_size = config.get("vocab_size")
        if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or vocab_size < 1:
            raise ConfigError(f"{files.folder / 'config.json'}: vocab_size is {vocab_size!r}; allowed: at least 1")

        def id_of(token_name: str) -> int | None:
            text = special_token_text(tokenizer_config.get(token_name))
            token_id = None if text is None else backend.token_to_id(text)
            return token_id if token_id is None or token_id < vocab_size else None

        eos = {id_of("eos_token"), *_ids(generation_config, "eos_token_id"), *_ids(config, "eos_token_id")}
        bos_token_id = id_of("bos_token")
        if bos_token_id is None:
            bos_token_id = next(iter(_ids(generation_config, "bos_token_id") + _ids(config, "bos_token_id")), None)
        writes_bos = bos_token_id in backend.encode("a").ids
        return cls(
            backend,
            vocab_size=vocab_size,
            eos_token_ids={i for i in eos if i is not None and i < vocab_size},
            bos_token_id=bos_token_id,
            chat_template=load_chat_template(files, tokenizer_config),
            # Llama's class in transformers adds it by this flag, whatever the post-processor of tokenizer.json says.
            prepend_bos=tokenizer_config.get("add_bos_token") is True and not writes_bos,
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether the model says how to write a conversation."""
        return self._chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written out in it become those tokens.

        Raises InvalidRequestError for text that is not valid Unicode (lone surrogates).
        """
        ids = _encode(self._backend, text, add_special_tokens)
        if add_special_tokens and self._prepend_bos:
            assert self.bos_token_id is not None
            ids.insert(0, self.bos_token_id)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Bytes that are no valid UTF-8 become U+FFFD; ids the tokenizer does not know become ""."""
        data = b"".join([self.token_bytes(i) for i in ids if not (skip_special_tokens and i in self.special_token_ids)])
        strip = self.num_stripped_spaces
        while strip and data.startswith(b" "):
            data, strip = data[1:], strip - 1
        return data.decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes that `token_id` adds to a text; b"" for an id the tokenizer does not know."""
        data = self._token_bytes.get(token_id)
        if data is None:
            token = self._backend.id_to_token(token_id)
            data = b"" if token is None else self._to_bytes(token, token_id in self._added)
            self._token_bytes[token_id] = data
        return data

    def token_text(self, token_id: int) -> str:
        """The token on its own as text; a part of a character becomes U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_id(self, text: str) -> int | None:
        """The one token that is written `text`, special or not; None if there is none."""
        token_id: int | None = self._backend.token_to_id(text)
        return token_id if token_id is None or token_id < self.vocab_size else None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The conversation as text, for showing: `encode_chat` gives its tokens.

        Raises InvalidRequestError, param "messages" or "chat_template_kwargs".
        """
        return self._template().render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
            tools=tools,
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of a conversation. Special tokens come from the template alone: their text in the caller's
        strings stays text, so that nobody can forge the end of a turn.

        Raises InvalidRequestError, param "messages" or "chat_template_kwargs".
        """
        template = self._template()
        assert self._chat_encoder is not None
        stand_ins = _StandIns(self._chat_encoder.special_pattern)
        text = template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
            tools=tools,
            rewrite=stand_ins.hide,
        )
        return self._chat_encoder.encode(text, stand_ins)

    def _template(self) -> ChatTemplate:
        if self._chat_template is None:
            raise InvalidRequestError(
                "messages cannot be answered: this model has no chat template; use /v1/completions with a prompt",
                param="messages",
            )
        return self._chat_template


class _StandIns:
    """Replaces special tokens' text in a caller's strings by one private character each, and back."""

    def __init__(self, special_pattern: re.Pattern[str]) -> None:
        self._pattern = special_pattern
        self._stand_in: dict[str, str] = {}
        self._original: dict[str, str] = {}

    def hide(self, text: str) -> str:
        return self._pattern.sub(self._hide_match, text)

    def _hide_match(self, match: re.Match[str]) -> str:
        found = match[0]
        if found not in self._stand_in:
            code = FIRST_STAND_IN + len(self._stand_in)
            if code > LAST_STAND_IN:
                raise ValueError("they use too many different private-use characters")
            self._stand_in[found] = chr(code)
            self._original[chr(code)] = found
        return self._stand_in[found]

    def show(self, text: str) -> str:
        return "".join([self._original.get(c, c) for c in text]) if self._original else text


class _ChatEncoder:
    """Encodes a rendered chat so that only the template's own special tokens become tokens.

    A second tokenizer reads all special tokens' text as plain text. In its place it knows one alias for each: a
    string with a random part that no caller can write, with the same stripping of neighbours. One pass of the library
    over the aliased text then cuts it exactly as the original would be cut.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        special = {i: t for i, t in backend.get_added_tokens_decoder().items() if t.special and t.content}
        self._backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self._backend.encode_special_tokens = True
        nonce = secrets.token_hex(16)
        self._alias = {token.content: f"\ue000{nonce}:{i}\ue001" for i, token in special.items()}
        self._backend.add_tokens([_aliased(token, self._alias[token.content]) for token in special.values()])
        self._real_id = {self._backend.token_to_id(self._alias[t.content]): i for i, t in special.items()}
        longest_first = sorted(self._alias, key=len, reverse=True)
        specials = "|".join(re.escape(text) for text in longest_first) or r"(?!)"
        self._specials = re.compile(specials)
        # Besides special tokens, the stand-in characters themselves, so that show() restores exactly what was hidden.
        self.special_pattern = re.compile(f"{specials}|[{chr(FIRST_STAND_IN)}-{chr(LAST_STAND_IN)}]")

    def encode(self, text: str, stand_ins: _StandIns) -> list[int]:
        aliased = self._specials.sub(lambda match: self._alias[match[0]], text)
        ids = _encode(self._backend, stand_ins.show(aliased), add_special_tokens=False, param="messages")
        return [self._real_id.get(i, i) for i in ids]


def _aliased(token: tokenizers.AddedToken, alias: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        alias, lstrip=token.lstrip, rstrip=token.rstrip, single_word=token.single_word, normalized=False
    )


def _encode(backend: tokenizers.Tokenizer, text: str, add_special_tokens: bool, *, param: str = "prompt") -> list[int]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{param} holds a lone surrogate at character {error.start}; allowed: valid Unicode", param=param
        ) from None
    # encode() would hold the interpreter lock all the while: 66 ms for 240 KB of text, in which no stream moves.
    ids: list[int] = backend.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids
    return ids


def _state(component: Any) -> dict[str, Any] | None:
    """A component of the `tokenizers` library as tokenizer.json writes it (serializing the vocabulary takes 0.1 s)."""
    state: dict[str, Any] | None = None if component is None else json.loads(component.__getstate__())
    return state


def _ids(config: Mapping[str, Any], name: str) -> list[int]:
    value = config.get(name)
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool) and i >= 0]


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's map of characters to bytes: printable Latin-1 stands for itself, the rest for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _bytes_of_decoder(decoder: Mapping[str, Any] | None) -> tuple[Callable[[str, bool], bytes], int]:
    """(token, is it an added one) → its bytes, and how many leading spaces the decoder strips off a text."""
    steps = list(decoder["decoders"]) if decoder and decoder["type"] == "Sequence" else [decoder] if decoder else []
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        alphabet = _byte_level_alphabet()

        def byte_level(token: str, is_added: bool) -> bytes:
            if is_added or not all(c in alphabet for c in token):
                return token.encode("utf-8")
            return bytes([alphabet[c] for c in token])

        return byte_level, 0

    replacements: list[tuple[str, str]] = []
    byte_fallback = False
    strip = 0
    for step in steps:
        if step["type"] == "Replace" and "String" in step["pattern"]:
            replacements.append((step["pattern"]["String"], step["content"]))
        elif step["type"] == "Metaspace":
            replacements.append((step["replacement"], " "))
            strip = 0 if step.get("prepend_scheme") == "never" else 1
        elif step["type"] == "ByteFallback":
            byte_fallback = True
        elif step["type"] == "Strip" and "Fuse" in kinds and step["content"] == " " and step["stop"] == 0:
            strip = int(step["start"])
        elif step["type"] != "Fuse":
            raise ConfigError(f"tokenizer.json's decoder step {step['type']} is not supported")
    if not replacements:
        raise ConfigError("tokenizer.json's decoder does not say how tokens join; known: ByteLevel, Replace, Metaspace")

    def sentencepiece(token: str, is_added: bool) -> bytes:
        if byte_fallback and (match := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode("utf-8")

    return sentencepiece, strip
