"""A two-way message channel between two processes: bytes in shared memory, wake-ups and death over a socket pair.

Owns framing, flow control and the shared memory. Knows nothing of what messages mean.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import tempfile
from collections import deque

RING_BYTES = 4 << 20  # a step's plan or result is some 10 KB, so that a full ring is rare; larger messages still pass
MAX_MESSAGE_BYTES = 1 << 30
_COUNTERS = struct.Struct("<QQ")  # bytes written so far by the sender of the record, bytes it has read so far
_LENGTH = struct.Struct("<Q")


class ChannelClosed(Exception):
    """The other end is gone, and everything it sent has been received."""


class _Ring:
    """A byte ring in shared memory. Positions count all bytes ever written; its users know how much room there is."""

    def __init__(self, fd: int) -> None:
        self.size = os.fstat(fd).st_size
        self._map = mmap.mmap(fd, self.size)
        self._view = memoryview(self._map)

    def write(self, position: int, data: memoryview) -> None:
        begin = position % self.size
        head = min(len(data), self.size - begin)
        self._view[begin : begin + head] = data[:head]
        self._view[: len(data) - head] = data[head:]

    def read_into(self, position: int, data: memoryview) -> None:
        begin = position % self.size
        head = min(len(data), self.size - begin)
        data[:head] = self._view[begin : begin + head]
        data[head:] = self._view[: len(data) - head]

    def close(self) -> None:
        self._view.release()
        self._map.close()


class ShmChannel:
    """One end. Nothing here blocks but `wait` and `flush`, which are for the end that has no event loop.

    Both counters of an end travel together in one record over the socket, never through the shared memory: what a
    record tells was written before the record was sent, so that no memory barrier is needed on any processor. Only the
    newest record counts; if the socket is full, one record is owed and is sent when it can be. A message that finds no
    room waits in this process's memory, and goes out in pieces as the reader makes room.

    The shared memory has no name: nothing is left of it when both processes are gone, however they ended.
    """

    def __init__(self, sock: socket.socket, outgoing: _Ring, incoming: _Ring) -> None:
        self._socket = sock
        sock.setblocking(False)
        self._outgoing, self._incoming = outgoing, incoming
        self._unsent: deque[memoryview] = deque()  # parts of messages for which the ring has no room yet
        self._written = self._peer_read = 0  # of the outgoing ring
        self._read = self._peer_written = 0  # of the incoming ring
        self._told_read = 0  # what the peer knows of `_read`
        self._owes_record = False
        self._record = b""  # rest of a record that the socket took in part
        self._received_records = b""
        self._length = bytearray()  # of the message being received, so far
        self._message: bytearray | None = None
        self._filled = 0  # bytes of `_message` that are there
        self._arrived: list[bytearray] = []  # complete messages that came in during `flush`
        self._at_end = False

    @classmethod
    def create(cls, ring_bytes: int = RING_BYTES) -> tuple[ShmChannel, tuple[int, int, int]]:
        """A channel, and the file descriptors of its other end, for `from_fds` in another process.

        The caller closes those descriptors once the process has them; until then its death cannot be noticed.
        Raises OSError if there is no memory for the rings.
        """
        here, there = socket.socketpair()
        ring_fds = (_anonymous_memory(ring_bytes), _anonymous_memory(ring_bytes))
        channel = cls(here, _Ring(ring_fds[0]), _Ring(ring_fds[1]))
        return channel, (there.detach(), ring_fds[1], ring_fds[0])

    @classmethod
    def from_fds(cls, socket_fd: int, outgoing_fd: int, incoming_fd: int) -> ShmChannel:
        """The other end, from what `create` gave; the descriptors belong to the channel from here on."""
        channel = cls(socket.socket(fileno=socket_fd), _Ring(outgoing_fd), _Ring(incoming_fd))
        os.close(outgoing_fd)
        os.close(incoming_fd)
        return channel

    def fileno(self) -> int:
        """The socket: readable when `receive` has something to do, writable matters only if `wants_write`."""
        return self._socket.fileno()

    @property
    def wants_write(self) -> bool:
        """A record is owed that the socket had no room for: call `on_writable` when it has."""
        return self._owes_record or bool(self._record)

    @property
    def num_unsent_bytes(self) -> int:
        """Bytes that wait in this process for room in the ring."""
        return sum(map(len, self._unsent))

    def send(self, message: bytes) -> None:
        """Send a message, or as much of it as there is room for now. A dead peer shows in `receive` alone."""
        assert len(message) <= MAX_MESSAGE_BYTES, f"a message of {len(message)} bytes"
        self._unsent.append(memoryview(_LENGTH.pack(len(message))))
        if message:
            self._unsent.append(memoryview(message))
        self._write_ring()
        self.on_writable()

    def receive(self) -> list[bytearray]:
        """All messages that are complete by now, oldest first. Raises ChannelClosed when there will be no more."""
        self._read_socket()
        messages, self._arrived = self._arrived, []
        self._read_ring(messages)
        if self._read - self._told_read >= self._incoming.size // 4:
            self._owes_record = True  # a writer that waits for room waits for a full ring: it always gets to know
        self._write_ring()
        self.on_writable()
        if self._at_end and not messages:
            raise ChannelClosed
        return messages

    def wait(self, timeout: float | None = None) -> list[bytearray]:
        """Block until there is a message, or for `timeout` seconds: []. Raises ChannelClosed like `receive`."""
        messages = self.receive()
        while not messages and self._poll(timeout):
            messages = self.receive()
        return messages

    def flush(self) -> None:
        """Block until all that was sent is in the ring. Raises ChannelClosed if the peer dies meanwhile."""
        while self._unsent or self.wants_write:
            self._poll(None)
            self._arrived = self.receive()
            if self._at_end:
                raise ChannelClosed

    def on_writable(self) -> None:
        """Send the record that is owed, if the socket takes it."""
        while self.wants_write:
            if not self._record:
                self._record = _COUNTERS.pack(self._written, self._read)
                self._told_read = self._read
                self._owes_record = False
            try:
                sent = self._socket.send(self._record)
            except BlockingIOError:
                return
            except OSError:  # the peer is gone: `receive` will say so, after what it still sent
                self._record = b""
                self._owes_record = False
                return
            self._record = self._record[sent:]

    def close(self) -> None:
        """Give up this end; the peer sees ChannelClosed. Safe to call twice."""
        if self._socket.fileno() >= 0:
            self._socket.close()
            self._outgoing.close()
            self._incoming.close()

    def _poll(self, timeout: float | None) -> bool:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN | (select.POLLOUT if self.wants_write else 0))
        return bool(poll.poll(None if timeout is None else 1000 * timeout))

    def _write_ring(self) -> None:
        """Move what waits into the ring, as far as there is room."""
        while self._unsent:
            room = self._outgoing.size - (self._written - self._peer_read)
            if room == 0:
                return
            part = self._unsent[0]
            piece = part[:room]
            self._outgoing.write(self._written, piece)
            self._written += len(piece)
            self._owes_record = True
            if len(piece) == len(part):
                self._unsent.popleft()
            else:
                self._unsent[0] = part[len(piece) :]

    def _read_socket(self) -> None:
        """Take in the newest record, or the end."""
        while not self._at_end:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                break
            except ConnectionError:
                data = b""
            self._at_end = not data
            self._received_records += data
        whole = len(self._received_records) // _COUNTERS.size * _COUNTERS.size
        if whole:
            peer_written, peer_read = _COUNTERS.unpack_from(self._received_records, whole - _COUNTERS.size)
            self._received_records = self._received_records[whole:]
            assert self._peer_written <= peer_written <= self._read + self._incoming.size, (peer_written, self._read)
            assert self._peer_read <= peer_read <= self._written, (peer_read, self._written)
            self._peer_written, self._peer_read = peer_written, peer_read

    def _read_ring(self, messages: list[bytearray]) -> None:
        """Take all bytes that are there out of the ring; add the messages they complete to `messages`."""
        while self._read < self._peer_written:
            if self._message is None:
                self._length += self._take(_LENGTH.size - len(self._length))
                if len(self._length) < _LENGTH.size:
                    return
                (length,) = _LENGTH.unpack(self._length)
                assert length <= MAX_MESSAGE_BYTES, f"a message of {length} bytes"
                self._length.clear()
                self._message, self._filled = bytearray(length), 0
            else:
                available = self._peer_written - self._read
                piece = memoryview(self._message)[self._filled : self._filled + available]
                self._incoming.read_into(self._read, piece)
                self._read += len(piece)
                self._filled += len(piece)
            if self._filled == len(self._message):
                messages.append(self._message)
                self._message = None

    def _take(self, count: int) -> bytearray:
        data = bytearray(min(count, self._peer_written - self._read))
        self._incoming.read_into(self._read, memoryview(data))
        self._read += len(data)
        return data


def _anonymous_memory(size: int) -> int:
    """A descriptor of `size` bytes of shared memory without a name. Raises OSError if there are not so many."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("servd-channel")
    else:
        with tempfile.TemporaryFile() as file:  # it has no name as long as it is open
            fd = os.dup(file.fileno())
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size)  # now, not as a SIGBUS at the first write
        else:
            os.truncate(fd, size)
    except OSError:
        os.close(fd)
        raise
    return fd
