"""Owns the bytes of the etcd v3 messages that a lease store exchanges: encoders of requests, decoders of answers.

Free of: IO, gRPC, the protobuf package. Invariant: a decoder returns a record or raises StoreError, whatever bytes
it is given; fields that it does not know are skipped, so newer servers may add some.

Field numbers: etcd's api/etcdserverpb/rpc.proto and api/mvccpb/kv.proto. Wire format:
https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from dataplane.errors import StoreError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}
_MAX_VARINT_BYTES = 10

_NOTHING = (b"",)


class CompareTarget(IntEnum):
    """What a transaction's comparison looks at; a key that is absent has 0 in each, and never equals a value."""

    VERSION = 0
    CREATE = 1
    MOD = 2
    VALUE = 3


class KeyValue(NamedTuple):
    """One key as etcd holds it. `lease` is 0 where the key has no TTL. A deletion has only key and mod_revision."""

    key: bytes = b""
    create_revision: int = 0
    mod_revision: int = 0
    version: int = 0
    value: bytes = b""
    lease: int = 0


class WatchEvent(NamedTuple):
    kv: KeyValue
    deleted: bool


@dataclass(frozen=True, slots=True)
class RangeResponse:
    """Keys as of `revision` of the store; `more` where the limit cut them off."""

    revision: int
    kvs: tuple[KeyValue, ...]
    more: bool


@dataclass(frozen=True, slots=True)
class TxnResponse:
    """`ranges` holds the answers of the branch's reads, in order."""

    revision: int
    succeeded: bool
    ranges: tuple[RangeResponse, ...]


@dataclass(frozen=True, slots=True)
class WatchResponse:
    """One message of a watch. `fragment`: the events of this revision go on in the next message."""

    revision: int
    created: bool
    canceled: bool
    compact_revision: int
    cancel_reason: str
    fragment: bool
    events: tuple[WatchEvent, ...]


def prefix_end(prefix: bytes) -> bytes:
    """The range end that covers, from `prefix` on, every key beneath it; b"\\0" is etcd's "to the last key"."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else b"\0"


# --- requests -------------------------------------------------------------------------------------------------


def range_request(key: bytes, *, end: bytes = b"", limit: int = 0, revision: int = 0) -> bytes:
    """`end` empty: the one key; `limit` 0: all; `revision` 0: the newest."""
    return _message((1, key), (2, end), (3, limit), (4, revision))


def put_request(key: bytes, value: bytes, *, lease: int = 0) -> bytes:
    return _message((1, key), (2, value), (3, lease))


def delete_request(key: bytes) -> bytes:
    return _message((1, key))


def range_op(request: bytes) -> bytes:
    """A read as one step of a transaction."""
    return _submessage(1, request)


def put_op(request: bytes) -> bytes:
    """A write as one step of a transaction."""
    return _submessage(2, request)


def delete_op(request: bytes) -> bytes:
    """A deletion as one step of a transaction."""
    return _submessage(3, request)


def compare(target: CompareTarget, key: bytes, equals: int | bytes) -> bytes:
    """The condition that `target` of `key` is `equals`: bytes for VALUE, else a number."""
    # The oneof of the compared value has the numbers 4 to 7 in the order of the targets. It is written even for 0:
    # an unset oneof happens to read as 0 in today's servers only.
    number = 4 + target
    wanted = _submessage(number, equals) if isinstance(equals, bytes) else _tag(number, _VARINT) + _varint(equals)
    return _message((2, target), (3, key)) + wanted


def txn_request(conditions: Sequence[bytes], *, success: Sequence[bytes]) -> bytes:
    """Run the steps `success`, in order and as one revision, if every one of the `conditions` holds; else nothing."""
    return b"".join(_submessage(1, condition) for condition in conditions) + b"".join(
        _submessage(2, op) for op in success
    )


def compact_request(revision: int) -> bytes:
    return _message((1, revision))


def lease_grant_request(ttl: int) -> bytes:
    """`ttl` in seconds; the server chooses the lease's number."""
    return _message((1, ttl))


def lease_revoke_request(lease: int) -> bytes:
    return _message((1, lease))


def watch_create_request(key: bytes, *, end: bytes, start_revision: int) -> bytes:
    """Progress reports and fragments are asked for."""
    return _submessage(1, _message((1, key), (2, end), (3, start_revision), (4, 1), (8, 1)))


def authenticate_request(name: str, password: str) -> bytes:
    return _message((1, name.encode()), (2, password.encode()))


# --- answers --------------------------------------------------------------------------------------------------


def decode_range_response(data: bytes) -> RangeResponse:
    answer = _Message(data)
    kvs = tuple(_key_value(kv) for kv in answer.every(2))
    return RangeResponse(_revision(answer), kvs, more=bool(answer.number(3)))


def decode_txn_response(data: bytes) -> TxnResponse:
    answer = _Message(data)
    ranges = [read for op in answer.every(3) for read in _Message(op).every(1)]
    return TxnResponse(_revision(answer), bool(answer.number(2)), tuple(map(decode_range_response, ranges)))


def decode_lease_grant_response(data: bytes) -> int:
    """The number of the lease. Raises StoreError also where the server names none."""
    lease = _Message(data).number(2)
    if lease == 0:
        raise StoreError("etcd granted no lease, and gave no reason")
    return lease


def decode_authenticate_response(data: bytes) -> str:
    """The token. Raises StoreError also where there is none."""
    token = _Message(data).blob(2)
    if not token:
        raise StoreError("etcd accepted user and password, but gave no token")
    return _text(token)


def decode_watch_response(data: bytes) -> WatchResponse:
    answer = _Message(data)
    return WatchResponse(
        revision=_revision(answer),
        created=bool(answer.number(3)),
        canceled=bool(answer.number(4)),
        compact_revision=answer.number(5),
        cancel_reason=_text(answer.blob(6)),
        fragment=bool(answer.number(7)),
        events=tuple(_watch_event(event) for event in answer.every(11)),
    )


def _watch_event(data: bytes) -> WatchEvent:
    event = _Message(data)
    return WatchEvent(_key_value(event.blob(2)), deleted=event.number(1) == 1)


def _key_value(data: bytes) -> KeyValue:
    numbers, blobs = _fields(data)
    number, blob = numbers.get, blobs.get
    return KeyValue(
        key=blob(1, _NOTHING)[-1],
        create_revision=number(2, 0),
        mod_revision=number(3, 0),
        version=number(4, 0),
        value=blob(5, _NOTHING)[-1],
        lease=number(6, 0),
    )


def _revision(answer: _Message) -> int:
    """Each answer has the response header as its field 1."""
    return _Message(answer.blob(1)).number(3)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


# --- wire format ----------------------------------------------------------------------------------------------


class _Message:
    """The fields of one message by their numbers. Of a field that is there twice, protobuf takes the last."""

    __slots__ = ("_blobs", "_numbers")

    def __init__(self, data: bytes) -> None:
        self._numbers, self._blobs = _fields(data)

    def number(self, number: int) -> int:
        """0 where it is absent or of another type."""
        return self._numbers.get(number, 0)

    def every(self, number: int) -> list[bytes]:
        """Each occurrence of a repeated message."""
        return self._blobs.get(number, [])

    def blob(self, number: int) -> bytes:
        """Text, bytes or a message; empty where it is absent or of another type."""
        return self._blobs[number][-1] if number in self._blobs else b""


def _message(*fields: tuple[int, int | bytes]) -> bytes:
    """Fields at their default are left out, as proto3 does."""
    parts = []
    for number, value in fields:
        if isinstance(value, bytes):
            parts.append(_submessage(number, value) if value else b"")
        elif value:
            parts.append(_tag(number, _VARINT) + _varint(value))
    return b"".join(parts)


def _submessage(number: int, data: bytes) -> bytes:
    return _tag(number, _BYTES) + _varint(len(data)) + data


def _tag(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _varint(value: int) -> bytes:
    value &= 0xFFFF_FFFF_FFFF_FFFF
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _fields(data: bytes) -> tuple[dict[int, int], dict[int, list[bytes]]]:
    """By their numbers the last of the varints (as int64) and fixed numbers, and all texts and messages. Raises
    StoreError.

    One loop without a call for numbers of one byte, which nearly all are: a start reads 70,000 fields of ten thousand
    leases, and a storm of leases as many in a few seconds.
    """
    numbers: dict[int, int] = {}
    blobs: dict[int, list[bytes]] = {}
    position, end = 0, len(data)
    while position < end:
        if (tag := data[position]) < 0x80:
            position += 1
        else:
            tag, position = _read_varint(data, position)
        number, kind = tag >> 3, tag & 7
        if number == 0:
            raise StoreError("etcd's answer is damaged: a field has the number 0")
        if kind in (_VARINT, _BYTES):
            if position < end and (size := data[position]) < 0x80:
                position += 1
            else:
                size, position = _read_varint(data, position)
            if kind == _VARINT:
                numbers[number] = size if size < 1 << 63 else size - (1 << 64)
                continue
        elif kind in _FIXED_SIZES:
            size = _FIXED_SIZES[kind]
        else:
            raise StoreError(f"etcd's answer is damaged: field {number} has the unknown wire type {kind}")
        start, position = position, position + size
        if position > end:
            raise StoreError(f"etcd's answer is cut short: field {number} wants {size} bytes, {end - start} are left")
        if kind != _BYTES:
            numbers[number] = int.from_bytes(data[start:position], "little")
        elif number in blobs:
            blobs[number].append(data[start:position])
        else:
            blobs[number] = [data[start:position]]
    return numbers, blobs


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    for at in range(position, min(position + _MAX_VARINT_BYTES, len(data))):
        byte = data[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at + 1
        shift += 7
    raise StoreError("etcd's answer is damaged: a number does not end")
