"""Frames between a worker and its parent: magic, length, checksum and payload, so that stray bytes are seen as such."""

from __future__ import annotations

import struct
import zlib

# Past this a length is taken for garbage: figures and descriptions cross the border, not models.
MAX_PAYLOAD_BYTES = 256 * 2**20
MAGIC = b"AGW1"
_HEADER = struct.Struct("!4sQI")


class FrameError(ValueError):
    """Bytes that are no frame, or a frame that is damaged."""


def encode(payload: bytes) -> bytes:
    """Wrap a payload into a frame.

    Raises:
        FrameError: when the payload is longer than a frame may be.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise FrameError(f"{len(payload)} bytes do not fit into a frame of at most {MAX_PAYLOAD_BYTES} bytes")
    return _HEADER.pack(MAGIC, len(payload), zlib.crc32(payload)) + payload


class FrameReader:
    """Puts frames together from the pieces in which a pipe delivers them."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def is_empty(self) -> bool:
        return not self._buffer

    def feed(self, piece: bytes) -> None:
        self._buffer += piece

    def next(self) -> bytes | None:
        """Return the payload of the next whole frame, None while it is incomplete.

        Raises:
            FrameError: when the bytes so far cannot become a frame; as early as the first of them.
        """
        start = bytes(self._buffer[: len(MAGIC)])
        if not MAGIC.startswith(start):
            raise FrameError(f"bytes that are no frame: {start!r}")
        if len(self._buffer) < _HEADER.size:
            return None
        _, num_bytes, checksum = _HEADER.unpack_from(self._buffer)
        if num_bytes > MAX_PAYLOAD_BYTES:
            raise FrameError(f"a frame of {num_bytes} bytes")
        if len(self._buffer) < _HEADER.size + num_bytes:
            return None
        payload = bytes(self._buffer[_HEADER.size : _HEADER.size + num_bytes])
        del self._buffer[: _HEADER.size + num_bytes]
        if zlib.crc32(payload) != checksum:
            raise FrameError("a frame whose checksum is wrong")
        return payload
