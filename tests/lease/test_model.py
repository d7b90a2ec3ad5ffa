"""dataplane/lease/model.py against flannel's own examples, Go's decoder rules and generated input."""

from __future__ import annotations

import contextlib
import json
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.errors import LeaseInvalid
from dataplane.lease.model import MAX_VALUE_BYTES, NO_IPV4, LeaseAttrs, LeaseKey

IP = IPv4Address("192.0.2.11")


@pytest.mark.parametrize(
    ("text", "subnet", "subnet_v6"),
    [
        ("10.5.52.0-24", "10.5.52.0/24", None),
        ("10.12.13.0-24&fd00:12:13::-56", "10.12.13.0/24", "fd00:12:13::/56"),
        ("10.5.52.7-24", "10.5.52.0/24", None),
        ("0.0.0.0-0", "0.0.0.0/0", None),
        ("0.0.0.0-0&fd00:12:13::-56", "0.0.0.0/0", "fd00:12:13::/56"),
    ],
)
def test_a_key_names_its_subnets(text: str, subnet: str, subnet_v6: str | None) -> None:
    wanted = LeaseKey(IPv4Network(subnet), None if subnet_v6 is None else IPv6Network(subnet_v6))
    assert LeaseKey.parse(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "10.12.13-24", "10.12.13.300-24", "10.12.13.0-24hi", "10.1.2.0-24&2001::", "10.1.2.0-32",
        "10.1.2.0-24&fd00::-128", "", "-", "10.1.2.0-24\n", "10.1.2.0/24", "010.1.2.0-24", "fd00::-64",
        "10.1.2.0-2\u0664", "\u0661\u0660.1.2.0-24",
        "10.1.2.0-24&fd00::%eth0-64", "\ud800",
    ],
)  # fmt: skip
def test_a_key_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(LeaseInvalid):
        LeaseKey.parse(text)


def test_the_refusal_of_an_endless_key_is_one_short_line() -> None:
    with pytest.raises(LeaseInvalid) as caught:
        LeaseKey.parse("x\n" * 100_000)
    assert len(str(caught.value)) < 250
    assert "\n" not in str(caught.value)


v4_subnets = st.builds(
    lambda address, length: IPv4Network((address, length), strict=False), st.integers(0, 2**32 - 1), st.integers(0, 31)
)
v6_subnets = st.builds(
    lambda address, length: IPv6Network((address, length), strict=False),
    st.integers(0, 2**128 - 1),
    st.integers(0, 127),
)
keys = st.builds(LeaseKey, v4_subnets, st.none() | v6_subnets)


@given(keys)
def test_a_key_comes_back_from_its_text(key: LeaseKey) -> None:
    assert LeaseKey.parse(str(key)) == key


@st.composite
def nearly(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> str:
    """One of `texts` with a few characters in the place of others, or none: many are still good."""
    text = draw(texts)
    at = draw(st.integers(0, len(text)))
    put = draw(st.just("") | st.text("0123456789abcdef.:-&%/ \n\\\"{}[],", max_size=2))
    return text[:at] + put + text[at + draw(st.integers(0, 2)) :]


@given(st.text() | st.from_regex(r"\A[\d.]{7,15}-\d{1,3}(&[0-9a-f:.]{2,20}-\d{1,3})?\Z") | nearly(keys.map(str)))
def test_any_text_gives_a_key_or_a_refusal(text: str) -> None:
    try:
        key = LeaseKey.parse(text)
    except LeaseInvalid:
        return
    assert LeaseKey.parse(str(key)) == key


@given(keys, keys)
def test_keys_overlap_where_they_share_an_address(one: LeaseKey, other: LeaseKey) -> None:
    def share(a: IPv4Network | IPv6Network, b: IPv4Network | IPv6Network) -> bool:
        return int(a[0]) <= int(b[-1]) and int(b[0]) <= int(a[-1])

    wanted = one.subnet != NO_IPV4 != other.subnet and share(one.subnet, other.subnet)
    if one.subnet_v6 is not None and other.subnet_v6 is not None:
        wanted = wanted or share(one.subnet_v6, other.subnet_v6)
    assert one.overlaps(other) == other.overlaps(one) == wanted


def test_a_key_of_ipv6_alone_has_no_ipv4_subnet() -> None:
    key = LeaseKey.parse("0.0.0.0-0&fd00::-64")
    assert key.subnets == (IPv6Network("fd00::/64"),)
    assert str(key) == "0.0.0.0-0&fd00::-64"
    assert not key.overlaps(LeaseKey.parse("10.5.1.0-24"))
    assert not key.overlaps(LeaseKey.parse("0.0.0.0-0"))
    assert LeaseKey.parse("0.0.0.0-0").subnets == ()


def test_a_key_is_cut_to_families() -> None:
    key = LeaseKey.parse("10.5.1.0-24&fd00::-64")
    assert str(key.within(ipv4=True, ipv6=False)) == "10.5.1.0-24"
    assert str(key.within(ipv4=False, ipv6=True)) == "0.0.0.0-0&fd00::-64"
    assert key.within(ipv4=True, ipv6=True) == key


NOWHERE, IPV6, OTHER_IPV6 = IPv4Address(0), IPv6Address("fd00:198:18::1"), IPv6Address("fd00:198:18::2")


@pytest.mark.parametrize(
    ("attrs", "at", "same"),
    [
        (LeaseAttrs(IP), (IP, None), True),
        (LeaseAttrs(IP), (IPv4Address("192.0.2.12"), None), False),
        (LeaseAttrs(IP, IPV6), (IP, OTHER_IPV6), True),
        (LeaseAttrs(IP, IPV6), (IPv4Address("192.0.2.12"), IPV6), False),
        (LeaseAttrs(NOWHERE, IPV6), (NOWHERE, IPV6), True),
        (LeaseAttrs(NOWHERE, IPV6), (NOWHERE, OTHER_IPV6), False),
        (LeaseAttrs(NOWHERE, IPV6), (IP, IPV6), True),
        (LeaseAttrs(IP, IPV6), (NOWHERE, IPV6), True),
        (LeaseAttrs(NOWHERE), (NOWHERE, None), False),
    ],
)
def test_a_node_is_known_by_its_ipv4_address_and_without_one_by_its_ipv6(
    attrs: LeaseAttrs, at: tuple[IPv4Address, IPv6Address | None], same: bool
) -> None:
    assert attrs.is_at(*at) == same


def test_a_node_is_named_by_the_address_that_tells_it_from_others() -> None:
    named = [LeaseAttrs(IP, IPV6).node, LeaseAttrs(NOWHERE, IPV6).node, LeaseAttrs(NOWHERE).node]
    assert named == [IP, IPV6, NOWHERE]


VXLAN = b'{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}'


@pytest.mark.parametrize(
    ("attrs", "value"),
    [
        (LeaseAttrs(IP), b'{"PublicIP":"192.0.2.11","PublicIPv6":null}'),
        (
            LeaseAttrs(IP, backend_type="vxlan", backend_data=VXLAN),
            b'{"PublicIP":"192.0.2.11","PublicIPv6":null,"BackendType":"vxlan","BackendData":' + VXLAN + b"}",
        ),
        (
            LeaseAttrs(IP, IPv6Address("fd00::11"), "vxlan", VXLAN, b'{"VNI":1}'),
            b'{"PublicIP":"192.0.2.11","PublicIPv6":"fd00::11","BackendType":"vxlan","BackendData":' + VXLAN
            + b',"BackendV6Data":{"VNI":1}}',
        ),
        (LeaseAttrs(IPv4Address(0), IPv6Address("fd00::11"), "vxlan", backend_v6_data=VXLAN),
         b'{"PublicIP":"0.0.0.0","PublicIPv6":"fd00::11","BackendType":"vxlan","BackendV6Data":' + VXLAN + b"}"),
        (LeaseAttrs(IP, backend_type="host-gw"),
         b'{"PublicIP":"192.0.2.11","PublicIPv6":null,"BackendType":"host-gw"}'),
    ],
)  # fmt: skip
def test_a_value_is_written_and_read_as_flannel_writes_it(attrs: LeaseAttrs, value: bytes) -> None:
    assert attrs.encode() == value
    assert LeaseAttrs.decode(value) == attrs


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
raws = st.just(b"") | json_values.filter(lambda value: value is not None).map(msgspec.json.encode)
all_attrs = st.builds(
    LeaseAttrs,
    st.ip_addresses(v=4),
    st.none() | st.ip_addresses(v=6),
    st.text(max_size=10),
    raws,
    raws,
)


@given(all_attrs)
def test_attributes_come_back_from_their_value(attrs: LeaseAttrs) -> None:
    value = attrs.encode()
    assert LeaseAttrs.decode(value) == attrs
    document = json.loads(value)
    assert document["PublicIP"] == str(attrs.public_ip)
    assert list(document)[:2] == ["PublicIP", "PublicIPv6"]


@pytest.mark.parametrize(
    "value",
    [
        b'{"publicip":"192.0.2.11"}',
        b' \n{"Extra":[{}],"PUBLICIP" : "192.0.2.11", "PublicIPv6":null}\n',
        b'{"PublicIP":"192.0.2.1","publicIP":"192.0.2.11"}',
        b'{"PublicIP":"192.0.2.1","publicip":"192.0.2.2","PublicIP":"192.0.2.11"}',
        b'{"publicip":"192.0.2.1","PublicIP":"192.0.2.2","publicip":"192.0.2.11"}',
        b'{"PublicIP":"192.0.2.11","BackendData":null,"BackendType":null}',
        b'{"PublicIP":"192.0.2.11","extra":"\xff"}',
        b'{"Public\xc4\xb0P":"192.0.2.1","PublicIP":"192.0.2.11"}',
    ],
)
def test_go_would_read_this_node(value: bytes) -> None:
    assert LeaseAttrs.decode(value) == LeaseAttrs(IP)


def test_names_fold_as_go_folds_them() -> None:
    assert LeaseAttrs.decode('{"PublicIP":"192.0.2.11","bac\u212aendtype":"udp"}'.encode()).backend_type == "udp"


@pytest.mark.parametrize(
    "value",
    [
        b"", b"null", b"[]", b'"x"', b"{}", b"{", b'{"PublicIP":"192.0.2.11"} x', b'\xff{"PublicIP":"192.0.2.11"}',
        b'{"PublicIP":null}', b'{"PublicIP":""}', b'{"PublicIP":3}', b'{"PublicIP":"192.0.2.011"}',
        b'{"PublicIP":"fd00::1"}',
        b'{"PublicIP":"192.0.2.11","publicip":null}', b'{"PublicIP":"192.0.2.11","PublicIPv6":"192.0.2.11"}',
        b'{"PublicIP":"192.0.2.11","PublicIPv6":"fe80::1%eth0"}', b'{"PublicIP":"192.0.2.11","BackendType":3}',
        b'{"PublicIP":"192.0.2.11","BackendType":"\xff"}', b'{"PublicIP":"192.0.2.11","BackendData":{"a":tru}}',
        b'{"PublicIP":"192.0.2.11","BackendData":NaN}',
        b'{"PublicIP":"192.0.2.11","x":' + b"[" * 1900 + b"]" * 1900 + b"}",
        b'{"PublicIP":"192.0.2.11","publicip":"\xff"}', b'{"\xff":1,"PublicIP":"192.0.2.11"}',
        b'{"PublicIP":"192.0.2.11"}' + b" " * MAX_VALUE_BYTES,
    ],
)  # fmt: skip
def test_what_is_no_lease_is_refused(value: bytes) -> None:
    with pytest.raises(LeaseInvalid):
        LeaseAttrs.decode(value)


def test_two_spellings_beside_deep_nesting_are_a_lease_or_a_refusal() -> None:
    value = b'{"PublicIP":"192.0.2.11","publicip":"192.0.2.11","x":' + b"[" * 1500 + b"]" * 1500 + b"}"
    with contextlib.suppress(LeaseInvalid):
        assert LeaseAttrs.decode(value) == LeaseAttrs(IP)


mixed_objects = st.fixed_dictionaries(
    {"PublicIP": st.ip_addresses(v=4).map(str)},
    optional={
        "PublicIPv6": st.ip_addresses(v=6).map(str) | json_values,
        "backendtype": st.text(max_size=5) | json_values,
        "BackendData": json_values,
        "BackendV6Data": json_values,
        "x": json_values,
    },
)
mixed_values = mixed_objects.map(msgspec.json.encode)
nearly_values = nearly(all_attrs.map(lambda attrs: attrs.encode().decode())).map(lambda text: text.encode())


@given(st.binary(max_size=200) | json_values.map(msgspec.json.encode) | mixed_values | nearly_values)
def test_any_bytes_give_attributes_or_a_refusal(value: bytes) -> None:
    try:
        attrs = LeaseAttrs.decode(value)
    except LeaseInvalid:
        return
    assert LeaseAttrs.decode(attrs.encode()) == attrs


names = st.sampled_from(["PublicIP", "publicip", "PUBLICIP", "BackendType", "backendtype", "x"])


@given(st.lists(st.tuples(names, st.sampled_from(["192.0.2.1", "192.0.2.2", "192.0.2.3"])), min_size=1, max_size=8))
def test_of_repeated_names_the_last_counts(pairs: list[tuple[str, str]]) -> None:
    value = "{" + ",".join(f'"{name}":"{text}"' for name, text in pairs) + "}"
    last = {name.lower(): text for name, text in pairs}
    if "publicip" not in last:
        with pytest.raises(LeaseInvalid):
            LeaseAttrs.decode(value.encode())
        return
    attrs = LeaseAttrs.decode(value.encode())
    assert (str(attrs.public_ip), attrs.backend_type) == (last["publicip"], last.get("backendtype", ""))
