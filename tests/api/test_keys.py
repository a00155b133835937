"""Key files: what they may hold, how keys are compared, limits of time and number, and reading again on change."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest

from servd.api import access, keys
from servd.api.access import ANONYMOUS, Caller, KeyRing
from servd.api.keys import hash_key, new_key, read_keys
from servd.api.rate_limits import Limits
from servd.cli import main
from servd.errors import AuthenticationError, ConfigError, RateLimitedError
from servd.outputs import RequestOutput
from servd.request import FinishReason

KEY = new_key()
HASH = hash_key(KEY)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def write_keys(path: Path, *entries: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps({"name": "ann", "hash": HASH} | entry) + "\n" for entry in entries))
    return path


def test_the_file_says_who_calls(tmp_path: Path) -> None:
    other = new_key()
    file = write_keys(
        tmp_path / "keys", {"models": ["a", "b"]}, {"name": "bob", "hash": hash_key(other), "tenant": "team"}
    )
    ring = KeyRing("main-key", file)
    assert ring.caller([KEY]) == Caller("ann", "ann", frozenset({"a", "b"}))
    assert ring.caller(["dummy", other]) == Caller("bob", "team")
    assert ring.caller(["main-key"]).tenant == ""
    for offered in ([], [""], [KEY + "x"], [HASH], ["\udcff"], [KEY[:-1]]):
        with pytest.raises(AuthenticationError, match="no valid API key"):
            ring.caller(offered)


def test_without_keys_everybody_may_call() -> None:
    assert KeyRing().is_open and KeyRing().caller([]) is ANONYMOUS


def test_toml_and_comments(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f'# ours\n[[keys]]\nname = "ann"\nhash = "{HASH}"\nexpires = 2027-01-01T00:00:00Z\nmodels = []\n')
    (entry,) = read_keys(file)
    assert (entry.name, entry.models, entry.expires) == ("ann", [], datetime(2027, 1, 1, tzinfo=UTC))
    lines = tmp_path / "keys.jsonl"
    lines.write_text(f'# ours\n\n{{"name": "ann", "hash": "{HASH}"}}\n')
    assert [entry.name for entry in read_keys(lines)] == ["ann"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "line 1: not valid JSON"),
        ("[" * 100_000, "line 1: not valid JSON"),
        ('{"name": "a"}', "missing required field `hash`"),
        ('{"name": "a", "hash": "plain"}', "hash"),
        ('{"name": "a b", "hash": "HASH"}', "name"),
        ('{"name": "a\\u0000", "hash": "HASH"}', "name"),
        ('{"name": "a", "hash": "HASH", "tenant": ""}', "tenant"),
        ('{"name": "a", "hash": "HASH", "max_concurrent": 0}', "max_concurrent"),
        ('{"name": "a", "hash": "HASH", "requests_per_min": 3}', "requests_per_min"),
        ('{"name": "a", "hash": "HASH"}\n{"name": "a", "hash": "HASH"}', "line 2: the name a occurs twice"),
        ("\xff", "not valid JSON"),
    ],
)
def test_a_broken_file_is_told_by_place(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(text.replace("HASH", HASH).encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        KeyRing(None, file)
    assert reason in caught.value.message and str(file) in caught.value.message


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        KeyRing(None, tmp_path / "none")


def test_disabled_and_expired_keys(tmp_path: Path) -> None:
    for fields, reason in (
        ({"disabled": True}, "is disabled"),
        ({"expires": "2020-01-01T00:00:00"}, "has expired"),
        ({"expires": "2020-01-01T00:00:00+02:00"}, "has expired"),
    ):
        ring = KeyRing(None, write_keys(tmp_path / "keys", fields))
        for _ in range(2):  # also when the key is known already
            with pytest.raises(AuthenticationError, match=reason):
                ring.caller([KEY])
    assert KeyRing(None, write_keys(tmp_path / "keys", {"expires": "2999-01-01T00:00:00Z"})).caller([KEY]).name == "ann"


def test_the_file_is_read_again_and_limits_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(access, "RELOAD_SECONDS", 0.0)
    monkeypatch.setattr(access, "Limits", partial(Limits, clock=Clock()))  # it stands still: nothing refills
    file = write_keys(tmp_path / "keys", {"max_concurrent": 1, "tokens_per_minute": 100})
    ring = KeyRing(None, file)
    limits = ring.caller([KEY]).limits
    assert limits is not None
    limits.begin(80, 1)
    write_keys(file, {"max_concurrent": 2, "tokens_per_minute": 90, "tenant": "moved"})
    assert ring.caller([KEY]).tenant == "moved" and ring.caller([KEY]).limits is limits
    with pytest.raises(RateLimitedError, match="90 a minute, of which 10 are left"):
        limits.begin(20, 1)
    for broken in ("{", None):
        if broken is None:
            file.unlink()
        else:
            file.write_text(broken)
        caplog.clear()
        for _ in range(3):
            assert ring.caller([KEY]).tenant == "moved"
        # By identity: where an earlier test set logging up, pytest listens to servd's own logger and to the root.
        told = {id(record): record.levelname for record in caplog.records if record.name == access.logger.name}
        assert list(told.values()) == ["ERROR"]
    file.write_text("")
    with pytest.raises(AuthenticationError):
        ring.caller([KEY])


def test_keys_are_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    real = keys.hmac.compare_digest

    def spying(a: str, b: str) -> bool:
        compared.append((a, b))
        return real(a, b)

    monkeypatch.setattr(keys.hmac, "compare_digest", spying)
    others = [{"name": f"k{i}", "hash": hash_key(new_key())} for i in range(4)]
    ring = KeyRing(None, write_keys(tmp_path / "keys", {}, *others))
    assert ring.caller([KEY]).name == "ann"
    assert len(compared) == 5, "all entries, although the first was the one"


def test_requests_come_back_evenly() -> None:
    clock = Clock()
    limits = Limits(requests_per_minute=6, clock=clock)
    for _ in range(6):
        limits.count_request()
    for _ in range(2):  # what is refused is not counted
        with pytest.raises(RateLimitedError, match="6 a minute") as caught:
            limits.count_request()
        assert caught.value.retry_after == pytest.approx(10)
    assert limits.headers() == {
        "x-ratelimit-limit-requests": "6", "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "60s",
    }  # fmt: skip
    clock.now = 10.0
    limits.count_request()
    clock.now = 1e6
    assert limits.headers()["x-ratelimit-remaining-requests"] == "6"


def test_tokens_are_charged_for_prompts_and_answers() -> None:
    clock = Clock()
    limits = Limits(tokens_per_minute=60, clock=clock)
    charge = limits.begin(20, 1)
    charge.take(RequestOutput("r", 0, token_ids=[1] * 100))
    assert limits.headers()["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(RateLimitedError, match="of which 0 are left") as caught:
        limits.begin(1, 1)
    assert caught.value.retry_after == pytest.approx(61)
    clock.now = 120.0
    limits.begin(1000, 1)  # longer than a minute's worth: it had to wait for a full minute
    with pytest.raises(RateLimitedError):
        limits.begin(1, 1)
    limits = Limits(tokens_per_minute=60, clock=clock)
    limits.begin(50, 1).refund()
    limits.begin(60, 1)


def test_a_place_is_held_until_the_last_answer_ends() -> None:
    limits = Limits(max_concurrent=1)
    charge = limits.begin(5, 2)
    for reason in (FinishReason.STOP, FinishReason.ABORT):
        with pytest.raises(RateLimitedError, match="1 at once"):
            limits.begin(5, 1)
        charge.take(RequestOutput("r", 0, finish_reason=reason))
    limits.begin(5, 1).refund()
    assert limits.num_concurrent == 0


def test_salts_of_different_tenants_never_meet() -> None:
    pairs = [("", ""), ("", "a"), ("a", ""), ("a", "b"), ("", "a\0b"), ("a\0b".replace("\0", "."), ""), ("ab", "")]
    assert len({Caller(tenant=tenant).cache_salt(salt) for tenant, salt in pairs}) == len(pairs)


def test_the_keys_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys.jsonl"
    limits = ["--requests-per-minute", "60", "--models", "a,b", "--expires", "2999-01-31"]
    assert main(["keys", "new", "--name", "ann", "--file", str(file), *limits]) == 0
    key = capsys.readouterr().out.strip()
    assert key.startswith("sk-servd-") and key not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    caller = KeyRing(None, file).caller([key])
    assert (caller.name, caller.models) == ("ann", frozenset({"a", "b"}))
    own = "my-own-very-long-random-key"
    monkeypatch.setattr("sys.stdin", io.StringIO(own + "\n"))
    assert main(["keys", "hash", "--name", "bob", "--tenant", "team", "--file", str(file)]) == 0
    assert capsys.readouterr().out == ""
    assert KeyRing(None, file).caller([own]).tenant == "team"
    assert main(["keys", "list", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["ann", "ann", "a,b", "60"] and "valid until 2999-01-31" in lines[1]
    assert lines[2].split() == ["bob", "team", "all", "-", "-", "-", "valid"]
    assert main(["keys", "new", "--name", "solo"]) == 0
    key, entry = capsys.readouterr().out.splitlines()
    file.write_text(entry)
    assert KeyRing(None, file).caller([key]).name == "solo"


def test_a_key_is_added_to_a_file_whose_last_line_is_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.jsonl"
    assert main(["keys", "new", "--name", "ann"]) == 0
    ann, entry = capsys.readouterr().out.splitlines()
    file.write_text(entry)  # as an editor may leave it
    assert main(["keys", "new", "--name", "bob", "--file", str(file)]) == 0
    bob = capsys.readouterr().out.strip()
    ring = KeyRing(None, file)
    assert [ring.caller([key]).name for key in (ann, bob)] == ["ann", "bob"]


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["new", "--name", "a b"], "name"),
        (["new", "--name", "a", "--max-concurrent", "0"], "max_concurrent"),
        (["new", "--name", "a", "--expires", "soon"], "--expires is 'soon'"),
        (["new", "--name", "a", "--file", "x.toml"], "x.toml"),
        (["hash", "--name", "a"], "allowed: 20 to 512"),
        (["list", "/nonexistent"], "cannot be read"),
        (["sell"], "'sell'"),
    ],
)
def test_the_keys_command_refuses(
    argv: list[str], problem: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("short\n"))
    assert main(["keys", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and problem in err and err.count("\n") == 1
