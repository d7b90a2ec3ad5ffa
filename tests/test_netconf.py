"""The network config against facts section 2, an obvious oracle, and whatever bytes hypothesis finds."""

from __future__ import annotations

import contextlib
import json
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dataplane.errors import ConfigError
from dataplane.json_text import MAX_BYTES
from dataplane.netconf import (
    AllocConfig,
    ForeignConfig,
    HostGwConfig,
    NetworkConfig,
    UdpConfig,
    VxlanConfig,
    parse,
)
from dataplane.path.capability import Capability

ORIGIN = "/etc/net-conf.json"


def config(**members: Any) -> NetworkConfig:
    return parse(json.dumps(members).encode(), origin=ORIGIN)


def fault(text: bytes | dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text if isinstance(text, bytes) else json.dumps(text).encode(), origin=ORIGIN)
    return str(caught.value)


def pointed_at(message: str) -> str:
    """The text from the caret on; every error shows the line and a caret below it."""
    *_, line, caret = message.split("\n")
    assert caret.strip() == "^"
    return line[caret.index("^") :]


def test_flannels_example_for_ipv4() -> None:
    found = config(Network="10.3.0.0/16")
    assert found == NetworkConfig(
        enable_ipv4=True,
        enable_ipv6=False,
        enable_nftables=False,
        network=IPv4Network("10.3.0.0/16"),
        subnet_len=24,
        subnet_min=IPv4Address("10.3.1.0"),
        subnet_max=IPv4Address("10.3.255.0"),
        ipv6_network=None,
        ipv6_subnet_len=0,
        ipv6_subnet_min=None,
        ipv6_subnet_max=None,
        backend=UdpConfig(8285),
        warnings=(),
    )


def test_flannels_example_for_ipv6() -> None:
    found = config(enableIPv4=False, enableIPv6=True, ipv6Network="fc00::/48")
    assert (found.enable_ipv4, found.network, found.subnet_min) == (False, None, None)
    assert (found.ipv6_network, found.ipv6_subnet_len) == (IPv6Network("fc00::/48"), 64)
    assert (found.ipv6_subnet_min, found.ipv6_subnet_max) == (
        IPv6Address("fc00:0:0:1::"),
        IPv6Address("fc00:0:0:ffff::"),
    )


@pytest.mark.parametrize(
    ("network", "length", "first", "last"),
    [
        ("10.0.0.0/22", 24, "10.0.1.0", "10.0.3.0"),
        ("10.0.0.0/23", 25, "10.0.0.128", "10.0.1.128"),
        ("10.0.0.16/28", 30, "10.0.0.20", "10.0.0.28"),
        ("255.255.0.0/16", 24, "255.255.1.0", "255.255.255.0"),
        ("10.9.8.7/8", 24, "10.0.1.0", "10.255.255.0"),
    ],
)
def test_default_range(network: str, length: int, first: str, last: str) -> None:
    found = config(Network=network)
    assert (found.subnet_len, str(found.subnet_min), str(found.subnet_max)) == (length, first, last)


def test_everything_given() -> None:
    found = config(
        Network="10.0.0.0/8", SubnetLen=20, SubnetMin="10.10.0.0", SubnetMax="10.99.0.0", EnableNFTables=True,
        EnableIPv6=True, IPv6Network="fd00::/40", IPv6SubnetLen=56, IPv6SubnetMin="fd00:0:5::",
        IPv6SubnetMax="fd00:0:6::", Backend={"Type": "UDP", "Port": 7890},
    )  # fmt: skip
    assert (found.subnet_len, str(found.subnet_min), str(found.subnet_max)) == (20, "10.10.0.0", "10.99.0.0")
    assert (found.ipv6_subnet_len, str(found.ipv6_subnet_min), str(found.ipv6_subnet_max)) == (
        56,
        "fd00:0:5::",
        "fd00:0:6::",
    )
    assert (found.enable_nftables, found.backend, found.warnings) == (True, UdpConfig(7890), ())


def test_zero_and_null_mean_unset() -> None:
    plain = config(Network="10.3.0.0/16")
    assert config(Network="10.3.0.0/16", SubnetLen=0, SubnetMin="0.0.0.0", SubnetMax=None, EnableIPv4=None) == plain


def test_names_match_in_any_case() -> None:
    found = config(NETWORK="10.3.0.0/16", subnetlen=26, backend={"type": "udp", "PORT": 99})
    assert (found.subnet_len, found.backend, found.warnings) == (26, UdpConfig(99), ())


NO_ROOM = "network must be able to accommodate at least four subnets"


@pytest.mark.parametrize(
    ("members", "text", "at"),
    [
        ({}, "please define a correct Network parameter in the flannel config", "{}"),
        ({"Network": "0.0.0.0/0"}, "please define a correct Network parameter in the flannel config", '"0.0.0.0/0"'),
        ({"Network": "10.0.0.0/8", "SubnetLen": 31}, "SubnetLen must be less than /31", "31"),
        ({"SubnetLen": 17, "Network": "10.0.0.0/16"}, NO_ROOM, "17"),
        ({"Network": "10.0.0.0/29"}, "network is too small. Minimum useful network prefix is /28", '"10.0.0.0/29"'),
        ({"Network": "10.0.0.0/16", "SubnetMin": "10.1.0.0"}, "SubnetMin is not in the range of the Network", '"10.1'),
        ({"Network": "10.0.0.0/16", "SubnetMax": "9.0.0.0"}, "SubnetMax is not in the range of the Network", '"9.0'),
        (
            {"Network": "10.0.0.0/16", "SubnetMin": "10.0.0.5"},
            "SubnetMin is not on a SubnetLen boundary: 10.0.0.5",
            '"10.0.0.5',
        ),
        (
            {"Network": "10.0.0.0/16", "SubnetMax": "10.0.9.5"},
            "SubnetMax is not on a SubnetLen boundary: 10.0.9.5",
            '"10.0.9.5',
        ),
        (
            {"Network": "10.0.0.0/16", "SubnetMin": "10.0.9.0", "SubnetMax": "10.0.8.0"},
            "SubnetMin 10.0.9.0 lies above SubnetMax 10.0.8.0",
            '"10.0.9',
        ),
        ({"Network": "10.0.0.0/16", "SubnetMax": "10.0.0.0"}, "SubnetMin 10.0.1.0 lies above SubnetMax 10.0.0.0", "{"),
        ({"EnableIPv4": False}, "none defined stack", "false"),
        ({"Network": "fd00::/48"}, "invalid CIDR address", '"fd00'),
        ({"Network": "10.0.0.0"}, "invalid CIDR address", '"10.0'),
        ({"Network": "10.0.0.0/255.0.0.0"}, "invalid CIDR address", '"10.0'),
        ({"Network": "10.0.0.0/33"}, "invalid CIDR address", '"10.0'),
        ({"Network": "10.0.0.0/8", "SubnetMin": "10.0.0"}, "invalid IP address", '"10.0.0"'),
        ({"Network": "10.0.0.0/8", "SubnetLen": -1}, "SubnetLen must not be negative", "-1"),
        ({"Network": "10.0.0.0/8", "SubnetLen": "24"}, "SubnetLen must be a whole number, not a string", '"24"'),
        ({"Network": "10.0.0.0/8", "SubnetLen": 24.0}, "SubnetLen must be a whole number, not a number", "24.0"),
        ({"Network": ["10.0.0.0/8"]}, "Network must be a string, not an array", "["),
        ({"Network": 7}, "Network must be a string, not a number", "7"),
        ({"EnableIPv4": "yes"}, "EnableIPv4 must be a boolean, not a string", '"yes"'),
        ({"EnableIPv6": {}}, "EnableIPv6 must be a boolean, not an object", "{}}"),
        ({"Network": "10.0.0.0/8", "Backend": "udp"}, "error decoding Backend property of config", '"udp"'),
        ({"Network": "10.0.0.0/8", "Backend": {}}, "unknown backend type: ", "{}"),
        ({"Network": "10.0.0.0/8", "Backend": {"Type": "x"}}, "unknown backend type: x", '"x"'),
        ({"Network": "10.0.0.0/8", "Backend": {"Type": 5}}, "Type must be a string, not a number", "5"),
        ({"Network": "10.0.0.0/8", "Backend": {"Type": "udp", "Port": 0}}, "Backend.Port 0 is no UDP port", "0"),
        ({"Network": "10.0.0.0/8", "Backend": {"Type": "udp", "Port": 65536}}, "Backend.Port 65536 is no UDP", "65536"),
    ],
)  # fmt: skip
def test_rules(members: dict[str, Any], text: str, at: str) -> None:
    message = fault(members)
    assert text in message
    assert message.startswith(f"{ORIGIN}, line 1, column ")
    assert pointed_at(message).startswith(at)


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"IPv6Network": None}, "please define a correct IPv6Network parameter in the flannel config"),
        ({"IPv6Network": "10.0.0.0/8"}, "invalid CIDR address"),
        ({"IPv6Network": "fe80::%eth0/64"}, "invalid CIDR address"),
        ({"IPv6Network": "fd00::/48", "IPv6SubnetLen": 127}, "SubnetLen must be less than /127"),
        ({"IPv6Network": "fd00::/48", "IPv6SubnetLen": 49}, NO_ROOM),
        ({"IPv6Network": "fd00::/125"}, "IPv6Network is too small. Minimum useful network prefix is /124"),
        ({"IPv6SubnetMin": "fe00::"}, "IPv6SubnetMin is not in the range of the IPv6Network"),
        ({"IPv6SubnetMax": "fe00::"}, "IPv6SubnetMax is not in the range of the IPv6Network"),
        ({"IPv6SubnetMin": "fd00::5"}, "IPv6SubnetMin is not on a SubnetLen boundary: fd00::5"),
        ({"IPv6SubnetMax": "fd00::5"}, "IPv6SubnetMax is not on a SubnetLen boundary: fd00::5"),
        ({"IPv6SubnetMax": "fd00::%1"}, "invalid IP address"),
    ],
)  # fmt: skip
def test_rules_for_ipv6(members: dict[str, Any], text: str) -> None:
    usual = {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fd00::/48"}
    assert text in fault({**usual, **members})


def test_a_family_that_is_off_is_parsed_but_not_checked() -> None:
    assert config(Network="10.3.0.0/16", IPv6Network="fd00::/127").ipv6_network is None
    assert "invalid CIDR" in fault({"Network": "10.3.0.0/16", "IPv6Network": "fd00::"})


def test_options_of_vxlan() -> None:
    assert config(Network="10.3.0.0/16", Backend={"Type": "VXLAN"}).backend == VxlanConfig(1, 8472, 0)
    found = config(
        Network="10.3.0.0/16",
        Backend={"type": "vxlan", "vni": 7, "PORT": 4789, "mtu": 9000, "gbp": True, "learning": True,
                 "directrouting": True, "dataplane": "UserSpace", "TunUSO": False},
    )  # fmt: skip
    assert found.backend == VxlanConfig(
        7, 4789, 9000, True, True, True, "userspace", frozenset({Capability.TUN_USO})
    )
    assert found.warnings == ()
    zero = config(Network="10.3.0.0/16", Backend={"Type": "vxlan", "Port": 0, "MTU": 0, "GBP": None, "Dataplane": ""})
    assert zero.backend == VxlanConfig()


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"VNI": 0}, "Backend.VNI 0 is no VXLAN network identifier: use 1 to 16777215"),
        ({"VNI": 16_777_216}, "no VXLAN network identifier"),
        ({"VNI": "1"}, "VNI must be a whole number, not a string"),
        ({"VNI": -1}, "VNI must not be negative"),
        ({"Port": 65_536}, "Backend.Port 65536 is no UDP port: use 1 to 65535, or 0 for 8472"),
        ({"MTU": 575}, "use 576 to 65535, or 0 for the underlay's"),
        ({"MTU": 65_536}, "use 576 to 65535"),
        ({"GBP": 1}, "GBP must be a boolean"),
        ({"Dataplane": "kernal"}, 'must be one of kernel, userspace, auto; did you mean "kernel"?'),
    ],
)
def test_bad_options_of_vxlan(members: dict[str, Any], text: str) -> None:
    assert text in fault({"Network": "10.3.0.0/16", "Backend": {"Type": "vxlan", **members}})


def test_ipv6_needs_a_larger_mtu() -> None:
    both = {"Network": "10.3.0.0/16", "EnableIPv6": True, "IPv6Network": "fd00::/48"}
    assert "use 1350 to 65535 with EnableIPv6" in fault({**both, "Backend": {"Type": "vxlan", "MTU": 1349}})
    assert config(**both, Backend={"Type": "vxlan", "MTU": 1350}).backend == VxlanConfig(mtu=1350)


def test_a_misspelt_option_is_told() -> None:
    (warning,) = config(Network="10.3.0.0/16", Backend={"Type": "vxlan", "DirectRoutin": True}).warnings
    assert '"DirectRoutin" is no known key and is ignored; did you mean "DirectRouting"?' in warning


def test_options_of_the_others() -> None:
    assert config(Network="10.3.0.0/16", Backend={"Type": "Host-GW"}).backend == HostGwConfig()
    assert config(Network="10.3.0.0/16", Backend={"Type": "alloc"}).backend == AllocConfig()
    udp = config(Network="10.3.0.0/16", Backend={"Type": "udp", "DirectRouting": True}).backend
    assert udp == UdpConfig(8285, frozenset(), True)


@pytest.mark.parametrize("kind", ["extension", "ipip", "ipsec", "tencent-vpc", "wireguard"])
def test_other_backends_keep_their_options(kind: str) -> None:
    backend = {"Type": kind.upper(), "VNI": 7, "Deep": {"a": [1, None]}}
    assert config(Network="10.3.0.0/16", Backend=backend).backend == ForeignConfig(kind, backend)


def test_line_and_column_of_a_missing_comma() -> None:
    message = fault(b'{\n  "Network": "10.0.0.0/8"\n  "SubnetLen": 24\n}')
    assert message.startswith(f"{ORIGIN}, line 3, column 3: this is not JSON: ")
    assert pointed_at(message) == '"SubnetLen": 24'


@pytest.mark.parametrize(
    ("text", "complaint", "at"),
    [
        (b'{"Network":"10.0.0.0/8",}', "trailing comma", "}"),
        ('{"é": 1,, "x": 2}'.encode(), "not JSON", ', "x"'),
        (b'{"Network":"10.0.0.0/8"} x', "trailing characters", "x"),
        (b'{"Network":"10.0.0.0/8"', "ends too early", ""),
        (b'{"a":NaN}', "not JSON", "NaN"),
        (b"", "ends too early", ""),
        (b" \n [1]", "a JSON object, not an array", "[1]"),
        (b"null", "a JSON object, not null", "null"),
        (b"7", "a JSON object, not a number", "7"),
        (b'{"a": "\xff"}', "not UTF-8", '\ufffd"}'),
        (b'\xef\xbb\xbf{"Network":"10.0.0.0/8"}', "byte order mark", ""),
        (b"\xff\xfe{\0}\0", "not UTF-8", ""),
        (b'{"a":' + b"[" * 60_000, "nested too deeply", ""),
        (b'{"a":' + b"[" * 30_000 + b"]" * 30_000 + b"}", "nested too deeply", ""),
        (b'{"a":' + b"1" * 200 + b"x}", "not JSON", "x}"),
    ],
)
def test_what_is_no_json_object(text: bytes, complaint: str, at: str) -> None:
    message = fault(text)
    assert complaint in message
    assert pointed_at(message).startswith(at)


def test_a_text_of_a_megabyte_is_refused_by_its_size() -> None:
    assert str(MAX_BYTES) in fault(b"[" * (1 << 20))


def test_the_caret_stands_right_under_odd_characters_and_in_long_lines() -> None:
    assert pointed_at(fault('{\t"é\u202e": "\U0001f600",\t"SubnetLen": "x"}'.encode())) == '"x"}'
    message = fault(json.dumps({"a": "y" * 5000, "SubnetLen": "x", "b": "z" * 5000}).encode())
    assert pointed_at(message).startswith('"x", "b"')
    assert all(len(line) < 150 for line in message.split("\n"))


def test_a_misspelt_network_is_found() -> None:
    message = fault(b'{\n  "Netwrok": "10.0.0.0/8"\n}')
    assert message.startswith(f"{ORIGIN}, line 2, column 3: please define a correct Network parameter")
    assert 'did you mean "Network"?' in message
    assert pointed_at(message).startswith('"Netwrok"')


def test_misspelt_backend_type_and_type_key() -> None:
    assert 'unknown backend type: vxlna; did you mean "vxlan"?' in fault(
        {"Network": "10.0.0.0/8", "Backend": {"Type": "vxlna"}}
    )
    message = fault({"Network": "10.0.0.0/8", "Backend": {"Tpye": "vxlan"}})
    assert 'did you mean "Type"?' in message
    assert pointed_at(message).startswith('"Tpye"')


def test_what_flannel_ignores_in_silence_is_a_warning() -> None:
    found = parse(
        b'{"Network":"10.3.0.0/16", "network":"10.4.0.0/16",\n "SubnetLenght": 20, "zz": {"Network": 1},'
        b' "Backend": {"Type":"udp", "Prot": 9}}',
        origin=ORIGIN,
    )
    assert found.network == IPv4Network("10.4.0.0/16")
    assert found.warnings == (
        f'{ORIGIN}, line 1, column 27: "network" stands here for the second time: the last one counts',
        f'{ORIGIN}, line 2, column 2: "SubnetLenght" is no known key and is ignored; did you mean "SubnetLen"?',
        f'{ORIGIN}, line 2, column 22: "zz" is no known key and is ignored',
        f'{ORIGIN}, line 2, column 70: "Prot" is no known key and is ignored; did you mean "Port"?',
    )


def test_members_of_other_objects_are_not_taken_for_ours() -> None:
    found = config(a={"Network": "1.0.0.0/8", "}": ["{", "Network"]}, Network="10.3.0.0/16", b='","Network":"x"')
    assert found.network == IPv4Network("10.3.0.0/16")


@given(st.binary(max_size=200))
@example(b'{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan","x":1e999}}')
@example(b'{"Network":"\\ud800"}')
@example(b'{"Backend":{"\\udc00":1}}')
@example(b'{"Network":"10.0.0.0/8","SubnetLen":' + b"9" * 6000 + b"}")
@example(b'{"Network":"10.0.0.0/8","SubnetLen":1e400}')
def test_any_bytes_give_a_config_or_a_config_error(text: bytes) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(parse(text, origin=ORIGIN), NetworkConfig)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(
        ["10.0.0.0/8", "fd00::/48", "10.0.1.0", "udp", "vxlan", "fd00::", "::/0", "0.0.0.0/0"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
KEYS = st.sampled_from(
    ["Network", "network", "SubnetLen", "SubnetMin", "SubnetMax", "Backend", "EnableIPv4", "EnableIPv6", "IPv6Network",
     "IPv6SubnetLen", "IPv6SubnetMin", "Typo", "EnableNFTables"]
)  # fmt: skip
BACKENDS = st.dictionaries(st.sampled_from(["Type", "type", "Port", "VNI"]), VALUES, max_size=3)


@given(st.dictionaries(KEYS, VALUES | BACKENDS, max_size=6), st.integers(0, 400), st.binary(max_size=2))
def test_nearly_right_configs_give_a_config_or_a_config_error(members: dict[str, Any], at: int, noise: bytes) -> None:
    text = json.dumps(members).encode()
    for variant in (text, text[:at], text[:at] + noise + text[at + len(noise) :]):
        with contextlib.suppress(ConfigError):
            assert isinstance(parse(variant, origin=ORIGIN), NetworkConfig)


@st.composite
def networks(draw: st.DrawFn, bits: int) -> tuple[int, int, int | None]:
    """An address with host bits, a prefix length, and a subnet length or None: all of them legal."""
    prefix = draw(st.integers(1, bits - 4))
    length = draw(st.none() | st.integers(prefix + 2, bits - 2))
    return draw(st.integers(0, 2**bits - 1)), prefix, length


@given(networks(32))
def test_ipv4_defaults_agree_with_the_oracle(case: tuple[int, int, int | None]) -> None:
    address, prefix, length = case
    members: dict[str, Any] = {"Network": f"{IPv4Address(address)}/{prefix}"}
    if length is not None:
        members["SubnetLen"] = length
    network = IPv4Network((address, prefix), strict=False)
    found = config(**members)
    if length is None:
        length = 24 if prefix <= 22 else prefix + 2
    # the oracle walks the subnets where there are few, and trusts ipaddress for the ends where there are many
    last = network.broadcast_address
    assert found.network == network
    assert found.subnet_len == length
    assert found.subnet_max == IPv4Network((last, length), strict=False).network_address
    subnets = network.subnets(new_prefix=length)
    next(subnets)
    assert found.subnet_min == next(subnets).network_address
    assert found.subnet_max in network


@given(networks(128))
def test_ipv6_defaults_agree_with_the_oracle(case: tuple[int, int, int | None]) -> None:
    address, prefix, length = case
    members: dict[str, Any] = {"EnableIPv6": True, "EnableIPv4": False}
    members["IPv6Network"] = f"{IPv6Address(address)}/{prefix}"
    if length is not None:
        members["IPv6SubnetLen"] = length
    network = IPv6Network((address, prefix), strict=False)
    found = config(**members)
    if length is None:
        length = 64 if prefix <= 62 else prefix + 2
    subnets = network.subnets(new_prefix=length)
    next(subnets)
    assert (found.ipv6_network, found.ipv6_subnet_len) == (network, length)
    assert found.ipv6_subnet_min == next(subnets).network_address
    assert found.ipv6_subnet_max == IPv6Network((network.broadcast_address, length), strict=False).network_address


@given(networks(32), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_given_bounds_pass_exactly_if_the_rules_hold(case: tuple[int, int, int | None], low: int, high: int) -> None:
    address, prefix, length = case
    length = length or max(24, prefix + 2)
    network = IPv4Network((address, prefix), strict=False)
    # half of the draws are pulled onto legal places, or nearly every case would be out of range
    low, high = (
        bound if bound % 2 else int(network.network_address) + (bound % network.num_addresses & -(1 << (32 - length)))
        for bound in (low, high)
    )
    first, last = IPv4Address(low), IPv4Address(high)
    legal = (
        all(bound in network for bound in (first, last))
        and all(IPv4Network((bound, length), strict=False).network_address == bound for bound in (first, last))
        and first <= last
    )
    if not low or not high:
        return  # zero means unset
    members = {"Network": str(network), "SubnetLen": length, "SubnetMin": str(first), "SubnetMax": str(last)}
    if legal:
        found = config(**members)
        assert (found.subnet_min, found.subnet_max) == (first, last)
    else:
        assert "Subnet" in fault(members)


def test_capabilities_are_on_unless_switched_off_in_any_case_of_their_names() -> None:
    text = (
        b'{"Network": "10.5.0.0/16", "Backend": {"Type": "udp", "tuntso": false, "UDPGRO": true, "UDPSegment": false}}'
    )
    backend = parse(text, origin="t").backend
    assert isinstance(backend, UdpConfig)
    assert backend.switched_off == {Capability.TUN_TSO, Capability.UDP_SEGMENT}


def test_a_switch_that_is_no_boolean_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="TunTSO"):
        parse(b'{"Network": "10.5.0.0/16", "Backend": {"Type": "udp", "TunTSO": "no"}}', origin="t")
