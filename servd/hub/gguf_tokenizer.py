"""GGUF vocabularies to tokenizer.json: byte-level BPE ("gpt2") and SentencePiece BPE ("llama").

Knows nothing of files; the `tokenizers` library does the tokenizing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from servd.hub.gguf_config import MetadataError

TOKEN_UNKNOWN, TOKEN_CONTROL, TOKEN_USER_DEFINED = 2, 3, 4
SPACE_MARK = "\u2581"

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """How text is cut before the merges apply."""

    make: Callable[[], Any]
    ignore_merges: bool = False  # a piece that is a token as a whole is taken whole
    nfc: bool = False
    add_bos: bool = False  # unless the metadata says otherwise


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split(pattern: str) -> Callable[[], Any]:
    def make() -> Any:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])

    return make


_GPT2 = _PreTokenizer(_gpt2)
_SINGLE_DIGITS = _PreTokenizer(_single_digits)
_LLAMA3 = _PreTokenizer(_split(_LLAMA3_SPLIT), ignore_merges=True, add_bos=True)
_QWEN2 = _PreTokenizer(_split(_QWEN2_SPLIT), nfc=True)

PRE_TOKENIZERS = {
    "default": _GPT2, "gpt-2": _GPT2, "gpt2": _GPT2, "olmo": _GPT2, "mpt": _GPT2,
    "smollm": _SINGLE_DIGITS, "starcoder": _SINGLE_DIGITS, "refact": _SINGLE_DIGITS, "command-r": _SINGLE_DIGITS,
    "codeshell": _SINGLE_DIGITS, "exaone": _SINGLE_DIGITS, "minerva-7b": _SINGLE_DIGITS,
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2, "deepseek-r1-qwen": _PreTokenizer(_split(_QWEN2_SPLIT)),
    "tekken": _PreTokenizer(_split(_TEKKEN_SPLIT), ignore_merges=True, add_bos=True),
}  # fmt: skip


def build_tokenizer(metadata: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer, and the dict of its tokenizer_config.json. Raises MetadataError."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise MetadataError("tokenizer.ggml.tokens is missing or is not a list of strings")
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level(metadata, tokens)
    elif kind == "llama":
        tokenizer, add_bos = _sentencepiece(metadata, tokens)
    else:
        raise MetadataError(f"tokenizer.ggml.model is {kind!r}; allowed: gpt2, llama")
    _add_tokens(tokenizer, tokens, _token_types(metadata, tokens), special_unknown=kind == "llama")

    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token_id := _token_id(metadata, key, tokens)) is not None:
            config[f"{name}_token"] = tokens[token_id]
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos)) and "bos_token" in config
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and "eos_token" in config
    config |= {"add_bos_token": add_bos, "add_eos_token": add_eos}
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    if add_bos or add_eos:
        ends = ([config["bos_token"]] if add_bos else []), ([config["eos_token"]] if add_eos else [])
        specials = [(token, tokens.index(token)) for token in dict.fromkeys(ends[0] + ends[1])]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*ends[0], "$A", *ends[1]], special_tokens=specials
        )
    return tokenizer, config


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> tuple[Tokenizer, bool]:
    pre_name = metadata.get("tokenizer.ggml.pre", "default")
    if pre_name not in PRE_TOKENIZERS:
        raise MetadataError(f"tokenizer.ggml.pre is {pre_name!r}; known: {', '.join(sorted(PRE_TOKENIZERS))}")
    pre = PRE_TOKENIZERS[pre_name]
    lines = metadata.get("tokenizer.ggml.merges")
    if not isinstance(lines, list):
        raise MetadataError("tokenizer.ggml.merges is missing")
    tokenizer = _bpe(tokens, _pairs(lines), ignore_merges=pre.ignore_merges)
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.make()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str]) -> tuple[Tokenizer, bool]:
    lines = metadata.get("tokenizer.ggml.merges")
    merges = _pairs(lines) if isinstance(lines, list) else _merges_of_scores(metadata, tokens)
    unknown = _token_id(metadata, "unknown", tokens)
    unk_token = None if unknown is None else tokens[unknown]
    tokenizer = _bpe(tokens, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True)
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    replace = normalizers.Replace(" ", SPACE_MARK)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE_MARK), replace]) if prefix else replace
    steps = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer, True


def _pairs(lines: list[str]) -> list[tuple[str, str]]:
    pairs = [(left, right) for left, space, right in (line.partition(" ") for line in lines) if space]
    if len(pairs) != len(lines):
        raise MetadataError("tokenizer.ggml.merges holds a line that is not two tokens")
    return pairs


def _bpe(tokens: list[str], merges: list[tuple[str, str]], **options: Any) -> Tokenizer:
    vocab: dict[str, int] = {}
    for token_id, token in enumerate(tokens):
        vocab.setdefault(token, token_id)
    try:
        return Tokenizer(BPE(vocab=vocab, merges=merges, **options))
    except Exception as error:  # the library raises bare Exception for a merge that names an unknown token
        raise MetadataError(f"its merges and tokens do not fit together: {error}") from None


def _merges_of_scores(metadata: Mapping[str, Any], tokens: list[str]) -> list[tuple[str, str]]:
    """SentencePiece stores scores, no merges: every way to build a token from two is a merge, best token first."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise MetadataError("tokenizer.ggml.scores is missing or does not fit tokenizer.ggml.tokens")
    types = _token_types(metadata, tokens)
    ids = {token: i for i, token in enumerate(tokens) if types[i] not in (TOKEN_UNKNOWN, TOKEN_CONTROL)}
    ranked = []
    for token, token_id in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((-scores[token_id], ids[left], ids[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _token_types(metadata: Mapping[str, Any], tokens: list[str]) -> list[int]:
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return [1] * len(tokens)
    if not isinstance(types, list) or len(types) != len(tokens):
        raise MetadataError("tokenizer.ggml.token_type does not fit tokenizer.ggml.tokens")
    return types


def _token_id(metadata: Mapping[str, Any], kind: str, tokens: list[str]) -> int | None:
    token_id = metadata.get(f"tokenizer.ggml.{kind}_token_id")
    if token_id is None:
        return None
    if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
        raise MetadataError(f"tokenizer.ggml.{kind}_token_id is {token_id}; allowed: 0 to {len(tokens) - 1}")
    return token_id


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int], *, special_unknown: bool) -> None:
    special_types = {TOKEN_CONTROL, TOKEN_UNKNOWN} if special_unknown else {TOKEN_CONTROL}
    pairs = [(token, kind) for token, kind in zip(tokens, types, strict=True) if token]
    specials = [AddedToken(token, normalized=False, special=True) for token, kind in pairs if kind in special_types]
    tokenizer.add_special_tokens(specials)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in pairs if k == TOKEN_USER_DEFINED])
