"""The flag table against Go's rules: texts and vectors were taken from Go's own `flag` and `strconv` packages."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.errors import ConfigError
from dataplane.options import FLAGS, Options, check, describe, parse, usage

# facts 1.2: every flag of flanneld with its default
FLANNEL_FLAGS = {
    "etcd-endpoints": ("http://127.0.0.1:4001", "http://127.0.0.1:2379"),
    "etcd-prefix": "/coreos.com/network",
    "etcd-keyfile": "",
    "etcd-certfile": "",
    "etcd-cafile": "",
    "etcd-username": "",
    "etcd-password": "",
    "iface": (),
    "iface-regex": (),
    "iface-can-reach": "",
    "subnet-file": "/run/flannel/subnet.env",
    "public-ip": "",
    "public-ipv6": "",
    "subnet-lease-renew-margin": 60,
    "ip-masq": False,
    "ip-masq-fully-random-disable": False,
    "kube-subnet-mgr": False,
    "kube-api-url": "",
    "kube-annotation-prefix": "flannel.alpha.coreos.com",
    "kubeconfig-file": "",
    "version": False,
    "healthz-ip": "0.0.0.0",
    "healthz-port": 0,
    "iptables-resync": 5,
    "iptables-forward-rules": True,
    "ip-blackhole-route": False,
    "net-config-path": "/etc/kube-flannel/net-conf.json",
    "set-node-network-unavailable": True,
    "v": 0,
    "vmodule": "",
    "log_backtrace_at": "",
}
OWN_FLAGS = {
    "lease-store": "",
    "control-socket": "",
    "metrics-port": 0,
    "source-check": "node",
    "vxlan-dataplane": "",
    "udp-segment": True,
    "udp-gro": True,
    "tun-tso": True,
    "tun-uso": True,
    "vxlan-source-ports": 8,
    "spin": 200,
    "moderation": 150,
    "queues": 1,
    "log-format": "text",
    "cleanup": False,
}


def failure(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(argv, {})
    return str(caught.value)


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check(parse(argv, {}))
    return str(caught.value)


def test_the_table_is_flannels_and_ours() -> None:
    assert {name: flag.default for name, flag in FLAGS.items()} == FLANNEL_FLAGS | OWN_FLAGS


def test_no_word_gives_the_defaults() -> None:
    options = parse([], {})
    assert options == Options()
    check(options)
    assert options.etcd_endpoints == ("http://127.0.0.1:4001", "http://127.0.0.1:2379")
    assert options.subnet_lease_renew_margin == 60


def test_a_mixed_command_line() -> None:
    words = ["-etcd-endpoints=http://a:1,http://b:2", "-ip-masq", "-iface", "eth0", "-iface=eth1"]
    words += ["--kube-subnet-mgr=true", "-v=10", "-healthz-port", "8080", "--iptables-forward-rules=false"]
    options = parse(words, {})
    assert options.etcd_endpoints == ("http://a:1", "http://b:2")
    assert options.iface == ("eth0", "eth1")
    assert (options.ip_masq, options.kube_subnet_mgr, options.iptables_forward_rules) == (True, True, False)
    assert (options.v, options.healthz_port) == (10, 8080)


def test_endpoints_are_split_but_not_trimmed() -> None:
    assert parse(["-etcd-endpoints=http://a:1, http://b:2,"], {}).etcd_endpoints == ("http://a:1", " http://b:2", "")


@pytest.mark.parametrize("word", ["-etcd-prefix", "--etcd-prefix"])
def test_the_last_of_a_repeated_flag_wins_and_a_value_may_look_like_a_flag(word: str) -> None:
    assert parse([word, "/a", f"{word}=-b=c"], {}).etcd_prefix == "-b=c"
    assert parse([word, "-v"], {}).etcd_prefix == "-v"
    assert parse([f"{word}="], {}).etcd_prefix == ""


@pytest.mark.parametrize(
    ("words", "value"),
    [(("1", "t", "T", "TRUE", "true", "True"), True), (("0", "f", "F", "FALSE", "false", "False"), False)],
)
def test_gos_words_for_booleans(words: tuple[str, ...], value: bool) -> None:
    for word in words:
        assert parse([f"-ip-masq={word}"], {}).ip_masq is value


@pytest.mark.parametrize("word", ["yes", "tRUE", "", "2", " true"])
def test_no_other_word_is_a_boolean(word: str) -> None:
    assert failure(f"-ip-masq={word}") == f'invalid boolean value "{word}" for -ip-masq: parse error'


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("0", 0), ("7", 7), ("+7", 7), ("-7", -7), ("-0", 0), ("017", 15), ("0o17", 15), ("0O17", 15), ("0_7", 7),
        ("0x10", 16), ("0X_1f", 31), ("0b101", 5), ("0B1_0", 2), ("1_000", 1000), ("00", 0),
        ("9223372036854775807", 2**63 - 1), ("-9223372036854775808", -(2**63)), ("-0x8000000000000000", -(2**63)),
        ("0" * 5000 + "7", 7),
    ],
)  # fmt: skip
def test_gos_integers(word: str, value: int) -> None:
    assert parse([f"-healthz-port={word}"], {}).healthz_port == value


@pytest.mark.parametrize("word", ["", "x", "08", "1__0", "_1", "1_", "0x", "0_x1", "0_", "--5", " 5", "5 ", "1.0", "٣"])
def test_what_go_takes_for_no_integer(word: str) -> None:
    assert failure(f"-v={word}") == f'invalid value "{word}" for flag -v: parse error'


@pytest.mark.parametrize("word", ["9223372036854775808", "-9223372036854775809", "0x8000000000000000", "9" * 6000])
def test_integers_beyond_64_bits(word: str) -> None:
    assert failure("-v", word) == f'invalid value "{word}" for flag -v: value out of range'


def test_gos_texts_for_bad_syntax() -> None:
    assert failure("-nope") == "flag provided but not defined: -nope"
    assert failure("--nope=1") == "flag provided but not defined: -nope"
    assert failure("-v") == "flag needs an argument: -v"
    for word in ("---v", "-=v", "--=v", "---"):
        assert failure(word) == f"bad flag syntax: {word}"


def test_a_near_miss_is_asked_for() -> None:
    assert failure("-ipmasq") == "flag provided but not defined: -ipmasq; did you mean -ip-masq?"
    assert failure("--etcd-endpoint=x").endswith("did you mean -etcd-endpoints?")


@pytest.mark.parametrize("argv", [["-ip-masq", "false", "-v=1"], ["--", "false"], ["false"], ["-v=1", "-", "-v=2"]])
def test_a_word_that_is_no_flag_is_an_error(argv: list[str]) -> None:
    text = failure(*argv)
    assert f'unexpected word "{"-" if "-" in argv else "false"}"' in text
    assert "-ip-masq=false" in text


def test_two_dashes_end_the_flags() -> None:
    assert parse(["-v=1", "--"], {}).v == 1


@pytest.mark.parametrize("word", ["-h", "--h", "-help", "--help", "-help=x"])
def test_help_ends_parsing(word: str) -> None:
    options = parse(["-v=3", word, "-nope"], {"FLANNELD_V": "x"})
    assert (options.help, options.v, options.warnings) == (True, 3, ())


def test_version_is_looked_at_before_the_environment() -> None:
    options = parse(["-version"], {"FLANNELD_V": "x"})
    assert (options.version, options.warnings) == (True, ())
    assert parse([], {"FLANNELD_VERSION": "true"}).version is False


def test_the_environment_fills_what_the_command_line_left_open() -> None:
    environ = {
        "FLANNELD_IP_MASQ": "true",
        "FLANNELD_V": "4",
        "FLANNELD_ETCD_PREFIX": "/env",
        "FLANNELD_IFACE": "eth0,eth1",
        "FLANNELD_ETCD_ENDPOINTS": "http://c:3,http://d:4",
        "FLANNELD_HEALTHZ_IP": "",
        "FLANNELD_LOG_BACKTRACE_AT": "a.go:1",
        "FLANNELD_LEASE_STORE": "sqlite:///x",
        "V": "9",
    }
    options = parse(["-etcd-prefix=/argv"], environ)
    assert (options.ip_masq, options.v, options.etcd_prefix) == (True, 4, "/argv")
    assert options.iface == ("eth0,eth1",)
    assert options.etcd_endpoints == ("http://c:3", "http://d:4")
    assert (options.healthz_ip, options.log_backtrace_at) == ("0.0.0.0", "a.go:1")
    assert options.lease_store == "sqlite:///x"
    assert options.warnings == ()


def test_a_flag_given_as_empty_still_beats_the_environment() -> None:
    assert parse(["-etcd-username="], {"FLANNELD_ETCD_USERNAME": "root"}).etcd_username == ""
    assert parse(["-ip-masq=false"], {"FLANNELD_IP_MASQ": "true"}).ip_masq is False
    assert parse(["-iface=a"], {"FLANNELD_IFACE": "b"}).iface == ("a",)


def test_a_bad_variable_is_a_warning_and_the_rest_is_read() -> None:
    options = parse([], {"FLANNELD_V": "x", "FLANNELD_IP_MASQ": "yes", "FLANNELD_ETCD_PREFIX": "/p"})
    assert (options.v, options.ip_masq, options.etcd_prefix) == (0, False, "/p")
    assert set(options.warnings) == {
        'Failed to set flag FLANNELD from env: invalid value "x" for FLANNELD_V: parse error',
        'Failed to set flag FLANNELD from env: invalid value "yes" for FLANNELD_IP_MASQ: parse error',
    }


@given(st.lists(st.text(max_size=30) | st.sampled_from([f"-{name}" for name in FLAGS]), max_size=6))
def test_any_words_give_options_or_a_config_error(argv: list[str]) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(parse(argv, {}), Options)
        check(parse(argv, {}))


@pytest.mark.parametrize(
    "word",
    [
        "-kube-subnet-mgr", "-kube-api-url=http://k", "-kubeconfig-file=/k", "-kube-annotation-prefix=x/y",
        "-net-config-path=/x",
    ],
)  # fmt: skip
def test_what_is_not_built_is_refused_by_name(word: str) -> None:
    text = refusal(word)
    assert text.startswith(f"{word.partition('=')[0]} is not built yet")
    assert "not from Kubernetes" in text


def test_defaults_and_switched_off_are_accepted() -> None:
    switched_off = [f"-{name}=false" for name, flag in FLAGS.items() if flag.boolean]
    check(parse(switched_off, {}))
    at_default = [f"-{name}={flag.default}" for name, flag in FLAGS.items() if isinstance(flag.default, str | int)]
    check(parse([word for word in at_default if not word.startswith("-version")], {}))


@pytest.mark.parametrize("margin", [1, 60, 1439])
def test_legal_margins(margin: int) -> None:
    check(parse([f"-subnet-lease-renew-margin={margin}"], {}))


@pytest.mark.parametrize(
    "word",
    [
        "-subnet-lease-renew-margin=0", "-subnet-lease-renew-margin=1440", "-subnet-lease-renew-margin=-5",
        "-healthz-port=-1", "-healthz-port=65536", "-source-check=loose", "-source-check=",
        "-public-ip=192.0.2", "-public-ip=fd00::1", "-public-ip=host", "-public-ipv6=192.0.2.1",
        "-public-ipv6=fe80::1%1",
        "-iface-can-reach=host", "-iface-regex=(", "-iface-regex=(?=x)", "-vmodule=x", "-vmodule==1", "-vmodule=x=y",
        "-iptables-resync=0", "-iptables-resync=-5", "-log-format=xml", "-subnet-file=", "-subnet-file=/run/flannel/",
        "-lease-store=etcd", "-lease-store=sqlite://x", "-lease-store=sqlite:/x", "-lease-store=/x",
        "-lease-store=sqlite:///", "-lease-store=sqlite:///x/", "-lease-store=SQLITE:///x",
    ],
)  # fmt: skip
def test_values_that_cannot_work_are_refused_by_name(word: str) -> None:
    assert refusal(word).startswith(f"invalid {word.partition('=')[0]}")


def test_our_own_flags_pass() -> None:
    words = ["--lease-store=sqlite:///var/lib/x.db", "-control-socket=/x", "--source-check", "strict", "-cleanup"]
    options = parse([*words, "-public-ip=192.0.2.11"], {})
    check(options)
    assert (options.lease_store, options.source_check) == ("sqlite:///var/lib/x.db", "strict")
    assert (options.control_socket, options.cleanup) == ("/x", True)


def test_help_names_every_flag_once_with_flannels_first() -> None:
    text = usage("flanneld")
    named = [line.split()[0][1:] for line in text.splitlines() if line.startswith("  -")]
    assert sorted(named[: len(FLANNEL_FLAGS)]) == sorted(FLANNEL_FLAGS)
    assert sorted(named[len(FLANNEL_FLAGS) :]) == sorted(OWN_FLAGS)
    assert "Usage: flanneld" in text
    assert '(default "http://127.0.0.1:4001,http://127.0.0.1:2379")' in text
    assert "(default 60)" in text
    assert "(default true)" in text
    assert "(default false)" not in text
    assert text.count("[not built yet]") == sum(not flag.built for flag in FLAGS.values())


def test_the_log_line_hides_the_password() -> None:
    line = describe(parse(["-etcd-password=hunter2", "-iface=a", "-iface=b"], {}))
    assert line.startswith("CLI flags config: {")
    assert "hunter2" not in line
    assert "iface:[a b]" in line
    assert "etcd-password: " in describe(parse([], {}))


def test_options_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse([], {}).v = 1  # type: ignore[misc]  # the point of the test
