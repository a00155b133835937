"""`servd eval`: how faithful a way of serving is: perplexity and fifty short questions, against float32.

Knows nothing of how it is measured (servd.eval.quality).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servd.cli.command import COMMANDS, Command
from servd.cli.judging import add_model_flags, add_text_flags, read_config
from servd.cli.progress import progress_display
from servd.cli.signals import ended_by_signals
from servd.config import EngineConfig
from servd.errors import ConfigError
from servd.eval.questions import questions

if TYPE_CHECKING:
    from servd.engine.tokenizer import Tokenizer
    from servd.eval.quality import Comparison, Quality

EXIT_NOT_FAITHFUL = 1


class EvalCommand(Command):
    """Loads the model into this process, first as asked, then in float32."""

    help = "judge a way of serving a model: perplexity and short questions, against float32"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The text, what to compare with, where results go, and how the model is loaded."""
        group = parser.add_argument_group("evaluation")
        add_text_flags(group)
        group.add_argument(
            "--against", default="float32", metavar="WHAT",
            help="float32: the same checkpoint, exact; none; or an earlier run's --json FILE [default: float32]",
        )  # fmt: skip
        group.add_argument("--strict", action="store_true", help="exit with 1 if it is not faithful [default: off]")
        add_model_flags(parser, omit=("kv_cache_memory", "max_model_len"))  # they follow from the text

    def run(self, arguments: argparse.Namespace) -> int:
        """Print the table and the verdict."""
        config = read_config(arguments).resolve()
        if arguments.strict and arguments.against == "none":
            raise ConfigError("--strict has nothing to judge by with --against none; allowed: float32 or a FILE")
        with progress_display() as progress, ended_by_signals():
            from servd.engine.tokenizer import Tokenizer
            from servd.eval.quality import Exam, compare, evaluate, reference_config
            from servd.eval.text import read_tokens
            from servd.hub import resolve_model

            files = resolve_model(config.model.model, progress=progress)
            tokenizer = Tokenizer.from_files(files)
            token_ids = read_tokens(tokenizer, arguments.text, arguments.tokens)
            text = {"tokens": len(token_ids), "context": arguments.context, "sha256": _hash(token_ids)}
            reference = _stored_reference(arguments.against, text)  # a wrong file is told before the work
            prompts = [encode_question(tokenizer, question.prompt) for question in questions()]
            exam = Exam(token_ids, arguments.context, prompts, tokenizer.decode, tokenizer.eos_token_ids)
            quality = evaluate(config, files, exam, progress)
            if arguments.against == "float32":
                reference = evaluate(reference_config(config), files, exam, progress)
        comparison = None if reference is None else compare(quality, reference)
        _print(quality, reference, comparison)
        if arguments.json:
            content = result(config, text, quality, reference, comparison)
            arguments.json.write_text(json.dumps(content, indent=1) + "\n")
        return EXIT_NOT_FAITHFUL if arguments.strict and comparison and not comparison.is_faithful else 0


def encode_question(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """As the model reads a user's question; a model without a chat template gets it as a form to fill in."""
    if tokenizer.has_chat_template:
        return tokenizer.encode_chat([{"role": "user", "content": prompt}])
    return tokenizer.encode(f"Question: {prompt}\nAnswer:")


def result(
    config: EngineConfig,
    text: dict[str, Any],
    quality: Quality,
    reference: Quality | None,
    comparison: Comparison | None,
) -> dict[str, Any]:
    """What --json writes: settings, the text, both qualities with every answer, the comparison and its verdict."""
    verdict = None if comparison is None else {
        **dataclasses.asdict(comparison), "within_noise": comparison.within_noise, "faithful": comparison.is_faithful,
    }  # fmt: skip
    return {
        "model": dataclasses.asdict(config.model),
        "cache": dataclasses.asdict(config.cache),
        "text": text,
        "questions": [question.prompt for question in questions()],
        "quality": dataclasses.asdict(quality),
        "reference": None if reference is None else dataclasses.asdict(reference),
        "comparison": verdict,
    }


def _hash(token_ids: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(token_ids)).encode()).hexdigest()


def _stored_reference(against: str, text: dict[str, Any]) -> Quality | None:
    from servd.eval.quality import Quality

    if against in ("float32", "none"):
        return None
    try:
        content = json.loads(Path(against).read_text(encoding="utf-8"))
        stored, reference = content["text"], Quality(**content["reference"])
        same_questions = content["questions"] == [question.prompt for question in questions()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--against {against}: {type(error).__name__}: {error}; allowed: float32, none, or a file that "
            "`servd eval --json` wrote with a reference in it"
        ) from None
    if stored != text or not same_questions:
        raise ConfigError(f"--against {against} judged by {stored}; allowed: this run's text and questions ({text})")
    return reference


def _print(quality: Quality, reference: Quality | None, comparison: Comparison | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "perplexity", "change", "right answers", "same words"):
        table.add_column(title, justify="right" if title else "left")
    total = len(quality.right)
    change = equal = ""
    if comparison is not None:
        change = f"{comparison.perplexity_change:+.2%} ± {comparison.perplexity_error:.2%}"
        equal = f"{comparison.equal_answers}/{total}"
    if reference is not None:
        table.add_row("float32", f"{reference.perplexity:.4f}", "", f"{reference.num_right}/{total}", "")
    table.add_row("as served", f"{quality.perplexity:.4f}", change, f"{quality.num_right}/{total}", equal)
    console = Console(width=120, highlight=False)
    console.print(table)
    if comparison is not None:
        console.print(verdict(comparison), soft_wrap=True)


def verdict(comparison: Comparison) -> str:
    """One sentence: faithful or not, and why."""
    from servd.eval.quality import FAITHFUL_PERPLEXITY

    noise = "within noise" if comparison.within_noise else "beyond noise"
    return (
        f"{'faithful' if comparison.is_faithful else 'NOT faithful'}: perplexity {comparison.perplexity_change:+.2%} "
        f"(allowed: {FAITHFUL_PERPLEXITY:.0%}); {comparison.only_reference_right} answers right in float32 alone, "
        f"{comparison.only_this_right} here alone: {noise} (McNemar p = {comparison.chance:.2f})"
    )


COMMANDS.register("eval")(EvalCommand())
