"""The shared-memory channel: any sizes in any interleaving arrive whole and in order, and a dead peer is an end."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servd.executor import shm_channel
from servd.executor.shm_channel import ChannelClosed, ShmChannel

RING = 4096


@contextlib.contextmanager
def channel_pair(ring_bytes: int = RING) -> Iterator[tuple[ShmChannel, ShmChannel]]:
    here, fds = ShmChannel.create(ring_bytes)
    there = ShmChannel.from_fds(*fds)
    try:
        yield here, there
    finally:
        here.close()
        there.close()


def make_message(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def test_messages_arrive_whole_and_in_order_both_ways() -> None:
    with channel_pair() as (here, there):
        here.send(b"plan 1")
        here.send(b"")
        here.send(b"plan 2")
        there.send(b"result")
        assert [bytes(m) for m in there.receive()] == [b"plan 1", b"", b"plan 2"]
        assert [bytes(m) for m in here.receive()] == [b"result"]
        assert here.receive() == there.receive() == []


# A size: of a message to send from one end. None: that end receives.
ACTIONS = st.lists(
    st.tuples(st.booleans(), st.one_of(st.none(), st.integers(0, 64), st.integers(0, 3 * RING))), max_size=60
)


@settings(deadline=None)
@given(actions=ACTIONS)
def test_any_interleaving_of_any_sizes(actions: list[tuple[bool, int | None]]) -> None:
    with channel_pair() as ends:
        sent: tuple[list[bytes], list[bytes]] = ([], [])
        received: tuple[list[bytes], list[bytes]] = ([], [])
        for number, (side, size) in enumerate(actions):
            if size is None:
                received[side].extend(map(bytes, ends[side].receive()))
            else:
                sent[side].append(make_message(number, size))
                ends[side].send(sent[side][-1])
        while any(end.num_unsent_bytes for end in ends) or [len(r) for r in received] != [len(s) for s in sent[::-1]]:
            before = [end.num_unsent_bytes for end in ends], [len(r) for r in received]
            for side in (False, True):
                received[side].extend(map(bytes, ends[side].receive()))
            after = [end.num_unsent_bytes for end in ends], [len(r) for r in received]
            # Two rounds without progress would be a deadlock; one is a record on its way.
            assert before != after or any(end.wants_write for end in ends) or _settles(ends, received)
        assert received == sent[::-1]


def _settles(ends: tuple[ShmChannel, ShmChannel], received: tuple[list[bytes], list[bytes]]) -> bool:
    counts = [len(r) for r in received], [end.num_unsent_bytes for end in ends]
    for side in (False, True):
        received[side].extend(map(bytes, ends[side].receive()))
    return counts != ([len(r) for r in received], [end.num_unsent_bytes for end in ends])


def test_a_sender_never_overwrites_what_is_not_read() -> None:
    with channel_pair() as (here, there):
        messages = [make_message(i, 1000) for i in range(40)]
        for message in messages:
            here.send(message)
        assert here.num_unsent_bytes > 40_000 - RING
        received: list[bytes] = []
        while here.num_unsent_bytes:
            received.extend(map(bytes, there.receive()))
            here.receive()
        received.extend(map(bytes, there.receive()))
        assert received == messages


def test_both_ends_may_send_more_than_the_rings_hold_before_they_read() -> None:
    with channel_pair() as ends:
        for end in ends:
            end.send(make_message(1, 5 * RING))
        received: list[list[bytes]] = [[], []]
        for _ in range(100):
            for end, messages in zip(ends, received, strict=True):
                messages.extend(map(bytes, end.receive()))
        assert received == [[make_message(1, 5 * RING)]] * 2


def test_a_full_socket_loses_no_wake_up() -> None:
    with channel_pair() as (here, there):
        count = 0
        while not here.wants_write:  # nobody reads: at last the socket takes no more records
            here.send(b"x")
            count += 1
        here.send(b"y")
        received = there.receive()
        while len(received) <= count:
            assert here.wants_write or here.num_unsent_bytes
            here.on_writable()
            here.receive()
            received += there.receive()
        assert bytes(received[-1]) == b"y"


def test_threads_with_blocking_ends_exchange_large_messages() -> None:
    with channel_pair() as (here, there):

        def echo() -> None:
            with contextlib.suppress(ChannelClosed):
                while True:
                    for message in there.wait():
                        there.send(bytes(message))
                        there.flush()

        thread = threading.Thread(target=echo)
        thread.start()
        try:
            for size in (1, RING - 8, RING, 10 * RING, 3):
                here.send(make_message(size, size))
                assert [bytes(m) for m in here.wait(timeout=10)] == [make_message(size, size)]
        finally:
            here.close()
            thread.join(10)
        assert not thread.is_alive()


def test_wait_gives_up_after_its_timeout() -> None:
    with channel_pair() as (here, _):
        assert here.wait(timeout=0.01) == []


def test_what_was_sent_before_the_end_arrives_before_the_end() -> None:
    with channel_pair() as (here, there):
        there.send(b"last words")
        there.close()
        assert [bytes(m) for m in here.receive()] == [b"last words"]
        for _ in range(2):
            with pytest.raises(ChannelClosed):
                here.receive()
        here.send(b"into the void")  # not an error: the end shows in receive alone


def test_flush_ends_when_the_reader_dies() -> None:
    with channel_pair() as (here, there):
        here.send(make_message(0, 2 * RING))
        there.send(b"unread")
        there.close()
        with pytest.raises(ChannelClosed):
            here.flush()
        assert [bytes(m) for m in here.receive()] == [b"unread"]


CHILD = """
import sys
from servd.executor.shm_channel import ShmChannel
channel = ShmChannel.from_fds(*map(int, sys.argv[1:]))
channel.send(b"here")
while True:
    channel.wait()
"""


def test_a_killed_peer_is_an_end_and_leaves_nothing_behind() -> None:
    names_before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    channel, fds = ShmChannel.create(RING)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    with subprocess.Popen([sys.executable, "-c", CHILD, *map(str, fds)], pass_fds=fds, env=env) as child:
        for fd in fds:
            os.close(fd)
        assert [bytes(m) for m in channel.wait(timeout=30)] == [b"here"]
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(ChannelClosed):
            channel.wait(timeout=30)
    channel.close()
    names_after = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    assert names_after <= names_before


def test_without_memfd_an_unlinked_file_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(shm_channel.os, "memfd_create", raising=False)
    with channel_pair() as (here, there):
        here.send(make_message(0, 2 * RING))
        received = there.receive()
        here.receive()
        received += there.receive()
        here.receive()
        received += there.receive()
        assert [bytes(m) for m in received] == [make_message(0, 2 * RING)]
