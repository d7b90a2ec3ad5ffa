"""The etcd codec against bytes worked out by hand from rpc.proto, and against garbage. Real etcd: test_etcd.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.errors import StoreError
from dataplane.lease import etcd_wire as wire

DECODERS: list[Callable[[bytes], object]] = [
    wire.decode_range_response,
    wire.decode_txn_response,
    wire.decode_watch_response,
    wire.decode_lease_grant_response,
    wire.decode_authenticate_response,
]
each_decoder = pytest.mark.parametrize("decode", DECODERS, ids=lambda decode: decode.__name__)

HEADER = bytes.fromhex("0a08 0801 1002 1807 2003")  # cluster 1, member 2, revision 7, term 3
KV = bytes.fromhex("0a01 6b 1002 1807 2003 2a01 76 3005")  # k, create 2, mod 7, version 3, v, lease 5
WATCH = HEADER + bytes.fromhex("5a12 0800 120e") + KV  # one event: PUT KV


def test_requests_have_the_bytes_of_rpc_proto() -> None:
    assert wire.range_request(b"a", end=b"b", limit=1000, revision=3) == bytes.fromhex("0a0161 120162 18e807 2003")
    assert wire.range_request(b"a") == bytes.fromhex("0a0161")
    assert wire.put_request(b"a", b"b", lease=5) == bytes.fromhex("0a0161 120162 1805")
    assert wire.delete_request(b"a") == bytes.fromhex("0a0161")
    assert wire.lease_grant_request(86_400) == bytes.fromhex("0880a305")
    assert wire.lease_revoke_request(-1) == bytes.fromhex("08 ffffffffffffffffff01")
    assert wire.compact_request(300) == bytes.fromhex("08ac02")
    assert wire.authenticate_request("u", "pw") == bytes.fromhex("0a0175 12027077")
    watch = wire.watch_create_request(b"a", end=b"b", start_revision=9)
    assert watch == bytes.fromhex("0a0c 0a0161 120162 1809 2001 4001")


@pytest.mark.parametrize(
    ("target", "compare"),
    [
        (wire.CompareTarget.VERSION, "0a05 1a0161 2000"),
        (wire.CompareTarget.CREATE, "0a07 1001 1a0161 2800"),
        (wire.CompareTarget.MOD, "0a07 1002 1a0161 3000"),
    ],
)
def test_a_comparison_with_zero_is_written_out(target: wire.CompareTarget, compare: str) -> None:
    assert wire.txn_request([wire.compare(target, b"a", 0)], success=[]) == bytes.fromhex(compare)


def test_the_steps_of_a_transaction_keep_their_order() -> None:
    steps = [wire.put_op(b"P"), wire.range_op(b"R"), wire.delete_op(b"D")]
    conditions = [wire.compare(wire.CompareTarget.MOD, b"a", 8), wire.compare(wire.CompareTarget.VALUE, b"a", b"v")]
    text = wire.txn_request(conditions, success=steps)
    assert text == bytes.fromhex("0a07 1002 1a0161 3008 0a08 1003 1a0161 3a0176 1203 120150 1203 0a0152 1203 1a0144")


def test_prefix_end_covers_the_prefix_only() -> None:
    assert wire.prefix_end(b"/net/") == b"/net0"
    assert wire.prefix_end(b"a\xff\xff") == b"b"
    assert wire.prefix_end(b"\xff") == b"\0"


def test_a_range_response_is_read() -> None:
    kv = wire.KeyValue(b"k", 2, 7, 3, b"v", 5)
    answer = wire.decode_range_response(HEADER + b"\x12\x0e" + KV + bytes.fromhex("1801 2002"))
    assert answer == wire.RangeResponse(7, (kv,), more=True)


def test_a_transaction_response_is_read() -> None:
    inner = b"\x12\x0e" + KV
    op = b"\x0a" + bytes([len(inner)]) + inner
    put = bytes.fromhex("1202 1200")
    answer = wire.decode_txn_response(HEADER + b"\x10\x01" + b"\x1a\x04" + put + b"\x1a" + bytes([len(op)]) + op)
    assert answer.succeeded
    assert answer.revision == 7
    assert [read.kvs[0].value for read in answer.ranges] == [b"v"]


def test_a_watch_response_is_read() -> None:
    answer = wire.decode_watch_response(WATCH + bytes.fromhex("1801 2001 28ac02 320162 3801"))
    assert answer.events == (wire.WatchEvent(wire.KeyValue(b"k", 2, 7, 3, b"v", 5), deleted=False),)
    assert (answer.created, answer.canceled, answer.fragment) == (True, True, True)
    assert (answer.compact_revision, answer.cancel_reason, answer.revision) == (300, "b", 7)


def test_negative_numbers_are_int64() -> None:
    assert wire.decode_lease_grant_response(bytes.fromhex("10 ffffffffffffffffff01")) == -1


def test_unknown_fields_of_every_type_are_skipped() -> None:
    unknown = bytes.fromhex("b83e07 b93e0102030405060708 ba3e0161 bd3e01020304")  # field 999: types 0, 1, 2, 5
    assert wire.decode_watch_response(unknown + WATCH + unknown) == wire.decode_watch_response(WATCH)


@pytest.mark.parametrize("damage", ["08", "0aff", "0a05 01", "03", "00", "08" + "ff" * 11, "09 010203"])
@each_decoder
def test_damage_is_a_store_error(decode: Callable[[bytes], object], damage: str) -> None:
    with pytest.raises(StoreError, match=r"cut short|damaged"):
        decode(bytes.fromhex(damage))


@pytest.mark.parametrize("decode", DECODERS[3:])
def test_an_answer_without_its_point_is_a_store_error(decode: Callable[[bytes], object]) -> None:
    with pytest.raises(StoreError, match=r"no reason|no token"):
        decode(HEADER)


@each_decoder
@given(data=st.binary(max_size=200))
def test_garbage_is_read_or_refused(decode: Callable[[bytes], object], data: bytes) -> None:
    try:
        decode(data)
    except StoreError as error:
        assert "etcd" in str(error)  # noqa: PT017 - most garbage is refused, some is read


@given(at=st.integers(0, len(WATCH) - 1), byte=st.integers(0, 255))
def test_a_changed_byte_is_read_or_refused(at: int, byte: int) -> None:
    changed = WATCH[:at] + bytes([byte]) + WATCH[at + 1 :]
    try:
        answer = wire.decode_watch_response(changed)
    except StoreError:
        return
    assert len(answer.events) <= len(changed)


@given(cut=st.integers(0, len(WATCH) - 1))
def test_a_cut_answer_never_yields_its_event(cut: int) -> None:
    try:
        answer = wire.decode_watch_response(WATCH[:cut])
    except StoreError:
        return
    assert answer.events == ()


@given(number=st.integers(-(2**63), 2**63 - 1))
def test_every_int64_survives(number: int) -> None:
    as_field_5 = b"\x28" + wire.compact_request(number)[1:] if number else b""
    assert wire.decode_watch_response(as_field_5).compact_revision == number
