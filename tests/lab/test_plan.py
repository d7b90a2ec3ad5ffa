"""Names and addresses of labs: distinct, recognisable, and refused where they cannot be."""

from __future__ import annotations

import json
from ipaddress import IPv4Interface, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane import netconf
from dataplane.errors import ConfigError
from dataplane.lab import plan
from dataplane.lab.plan import LabError, PodNetwork, Settings

LAB_NAMES = st.from_regex(r"[a-z0-9](?:[a-z0-9-]{0,18}[a-z0-9])?", fullmatch=True)
MEMBERS = st.one_of(
    st.just("switch"),
    st.integers(1, plan.MAX_NODES).map("n{}".format),
    st.tuples(st.integers(1, plan.MAX_NODES), st.integers(1, plan.MAX_PODS)).map(lambda pair: "n{}-p{}".format(*pair)),
)


@given(LAB_NAMES, MEMBERS)
def test_a_namespace_tells_its_lab_and_member(lab: str, member: str) -> None:
    name = plan.namespace(lab, member)
    assert plan.member_of(lab, name) == member
    assert plan.lab_of(name) == lab


@given(LAB_NAMES, LAB_NAMES, MEMBERS)
def test_a_namespace_belongs_to_one_lab_only(lab: str, other: str, member: str) -> None:
    if lab != other:
        assert plan.member_of(other, plan.namespace(lab, member)) is None


@pytest.mark.parametrize("other", ["lab-n1", "lab-switch", "lab-n1-p1"])
def test_labs_whose_names_contain_each_other_stay_apart(other: str) -> None:
    for member in ("switch", "n1", "n1-p1"):
        assert plan.member_of("lab", plan.namespace(other, member)) is None
        assert plan.member_of(other, plan.namespace("lab", member)) is None


@pytest.mark.parametrize("name", ["", "Lab", "a b", "-a", "a-", "a/b", "..", "a" * 21, "lab\n"])
def test_bad_lab_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a lab"):
        plan.check_lab_name(name)


def test_addresses_are_distinct_and_within_the_benchmark_range() -> None:
    addresses = {plan.node_address(number).ip for number in range(1, plan.MAX_NODES + 1)}
    assert len(addresses | {plan.SWITCH_ADDRESS.ip}) == plan.MAX_NODES + 1
    assert all(address in IPv4Network("198.18.0.0/15") for address in addresses)
    assert plan.node_address(1) == IPv4Interface("198.18.1.1/15")


def test_subnet_env_gives_bridge_and_pod_addresses() -> None:
    text = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.7.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
    network = PodNetwork.parse(text, "subnet.env")
    assert (str(network.bridge), network.mtu, network.bridge_v6) == ("10.244.7.1/24", 1472, None)
    assert str(network.pod_address(1)) == "10.244.7.2"
    with pytest.raises(LabError, match="no subnet of IPv6"):
        network.pod_address(1, 6)


def test_subnet_env_of_two_families_gives_pods_two_addresses() -> None:
    v6 = "FLANNEL_IPV6_NETWORK=fd00:10:244::/48\nFLANNEL_IPV6_SUBNET=fd00:10:244:7::1/64\nFLANNEL_MTU=1430\n"
    both = PodNetwork.parse(f"FLANNEL_SUBNET=10.244.7.1/24\n{v6}", "subnet.env")
    addresses = [str(both.pod_address(2, version)) for version in (0, 4, 6)]
    assert addresses == ["10.244.7.3", "10.244.7.3", "fd00:10:244:7::3"]
    alone = PodNetwork.parse(v6, "subnet.env")
    assert [str(alone.pod_address(1, version)) for version in (0, 6)] == ["fd00:10:244:7::2"] * 2
    assert plan.pod_links(1, alone)[1:] == [
        "addr add fd00:10:244:7::2/64 dev eth0", "link set eth0 up", "route add default via fd00:10:244:7::1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", "FLANNEL_MTU=1472", "FLANNEL_SUBNET=x\nFLANNEL_MTU=1", "FLANNEL_SUBNET=10.1.1.1/24"]
)
def test_a_broken_subnet_env_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="here/subnet"):
        PodNetwork.parse(text, "here/subnet.env")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"store": "kube"}, "--store=kube"),
        ({"backend": "ipip"}, "not built yet"),
        ({"backend": "vxlan", "dataplane": "kernel,users"}, "'users' is none of kernel, userspace, auto"),
        ({"backend": "vxlan", "dataplane": ","}, "'' is none of"),
        ({"dataplane": "kernel"}, "only --backend=vxlan has a choice"),
        ({"backend": "host-gw", "direct_routing": True}, "no encapsulation that it could leave out"),
        ({"network": "10.244.0.0/24"}, "/22 or larger"),
        ({"network": "198.18.0.0/16"}, "overlap"),
        ({"network": "ten"}, "--network=ten"),
        ({"underlay_mtu": 100}, "--underlay-mtu=100"),
        ({"pods": -1}, "--pods=-1"),
        ({"families": "64"}, "--families=64: a lab speaks 4, 6 or 46"),
        ({"families": "6"}, "udp needs IPv4 between the nodes"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Settings(**changes)  # type: ignore[arg-type]  # any of the fields


def test_each_node_is_told_its_dataplane() -> None:
    settings = Settings(backend="vxlan", dataplane="kernel,userspace", direct_routing=True)
    assert [settings.dataplane_of(number) for number in (1, 2, 3)] == ["kernel", "userspace", "userspace"]
    assert json.loads(settings.net_conf())["Backend"] == {"Type": "vxlan", "DirectRouting": True}
    assert Settings().dataplane_of(3) == ""
    assert json.loads(Settings().net_conf())["Backend"] == {"Type": "udp"}


def test_no_more_dataplanes_than_nodes() -> None:
    settings = Settings(backend="vxlan", dataplane="kernel,userspace,userspace")
    settings.check_count(3)
    with pytest.raises(ConfigError, match="names 3 nodes, and the lab has 2"):
        settings.check_count(2)


@pytest.mark.parametrize(
    ("families", "keys"), [("4", {"Network"}), ("6", {"IPv6Network"}), ("46", {"Network", "IPv6Network"})]
)
def test_the_net_conf_has_the_families_of_the_lab(families: str, keys: set[str]) -> None:
    text = Settings(backend="vxlan", families=families).net_conf()
    network = netconf.parse(text.encode(), origin="lab")
    assert {key for key in json.loads(text) if key.endswith("Network")} == keys
    assert (network.enable_ipv4, network.enable_ipv6) == ("4" in families, "6" in families)
