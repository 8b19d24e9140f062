import pytest

from common.network.addresses import check_listen, check_target, check_targets


@pytest.mark.parametrize(
    "address", ["127.0.0.1:8600", "localhost:1", "[::1]:65535", "tasks.decode.svc.:80", "unix:/run/x", "dns:///name:80"]
)
def test_addresses(address: str) -> None:
    check_target(str, address)
    check_targets(str, address)
    check_listen(str, address)


@pytest.mark.parametrize("address", ["127.0.0.1:0", "0.0.0.0:8600", "[::]:0"])
def test_addresses_to_listen_on(address: str) -> None:
    check_listen(str, address)


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("foo:bar", "with a port from 1 to 65535"),
        ("foo", "with a port from 1 to 65535"),
        ("", "with a port from 1 to 65535"),
        ("foo:0", "with a port from 1 to 65535"),
        ("foo:65536", "with a port from 1 to 65535"),
        ("foo:0080000", "with a port from 1 to 65535"),
        ("foo:-1", "with a port from 1 to 65535"),
        (f"foo:{'9' * 5000}", "with a port from 1 to 65535"),
        ("http://foo:8600", "without http://"),
        ("https://foo:8600", "without http://"),
        ("::1:8600", "brackets around an IPv6 address"),
        (":8600", "with a port from 1 to 65535"),
        (".svc:8601", "no host can have this name"),
        (f"{'x' * 64}.svc:8601", "no host can have this name"),
    ],
)
def test_what_is_no_address(address: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_target(str, address)


@pytest.mark.parametrize("address", ["ipv4:10.0.0.1:8600,10.0.0.2:8600", "ipv4:10.0.0.1:8600", "ipv6:[::1]:1,[::2]:1"])
def test_lists_of_addresses_to_call(address: str) -> None:
    check_targets(str, address)


@pytest.mark.parametrize("address", ["ipv4:10.0.0.1:8600,", "ipv4:10.0.0.1", "ipv6:::1:80"])
def test_what_is_no_such_list(address: str) -> None:
    with pytest.raises(ValueError, match="Must be host:port"):
        check_targets(str, address)


@pytest.mark.parametrize("address", ["10.0.0.1:80,10.0.0.2:80", "a:80,b:80"])
def test_how_a_list_is_written(address: str) -> None:
    with pytest.raises(ValueError, match="a list is written ipv4:"):
        check_targets(str, address)


@pytest.mark.parametrize(
    "address", ["ipv4:localhost:80,127.0.0.1:81", "ipv6:[::1]:80,127.0.0.1:81", "ipv4:1.2.3.4:1, 1.2.3.5:2"]
)
def test_a_list_is_of_addresses_of_one_kind(address: str) -> None:
    with pytest.raises(ValueError, match="each host is an ipv"):
        check_targets(str, address)
