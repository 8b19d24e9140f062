"""`twostroke key`, and `serve` with the keys file that comes of it."""

import stat
from pathlib import Path

import pytest

from cli.commands import app
from cli.key import key
from cli.main import main
from cli.serve import _client, _secret, _tls_environment, serve
from cli.serve_config import ServeConfig
from common.security import cluster_secret
from common.security.security_config import SettingsError
from router.callers.api_keys import ApiKeys
from tests.certificates import sign
from tests.protos.fake_router import FakeRouter, serving


def test_the_lines_go_to_the_file_and_the_key_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app(["key", "alice"], result_action="return_value")
    lines, shown = capsys.readouterr()
    file = tmp_path / "keys.toml"
    file.write_text(lines)
    made = shown.rpartition(" ")[2].strip()
    assert made not in lines
    caller = ApiKeys(file).caller(made)
    assert caller is not None
    assert caller.name == "alice"
    key("alice")
    assert capsys.readouterr().err != shown


def test_a_name_that_is_none_ends_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["twostroke", "a b"])
    sentence = "^twostroke key: 'a b' is not a key name: use 1 to 64 letters, digits, - and _$"
    with pytest.raises(SystemExit, match=sentence):
        main("key")


def test_with_keys_the_parts_of_serve_get_a_secret_while_they_run(tmp_path: Path) -> None:
    with _secret(ServeConfig(api_keys=tmp_path)) as config:
        file = config.cluster_secret_file
        assert file is not None
        assert cluster_secret.read(file)
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert not file.exists()


def test_a_secret_that_is_given_and_one_that_is_not_needed_stay(tmp_path: Path) -> None:
    for config in (ServeConfig(), ServeConfig(api_keys=tmp_path, cluster_secret_file=tmp_path)):
        with _secret(config) as same:
            assert same is config


def test_serve_asks_its_router_with_the_secret(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef\n")
    config = ServeConfig(api_keys=tmp_path, cluster_secret_file=secret)
    with serving(FakeRouter(api_key="0123456789abcdef")) as router, _client(config, router.address) as client:
        assert client.generate("Hello").text


def test_serve_with_a_certificate_needs_its_authority(tmp_path: Path) -> None:
    signed = sign(tmp_path / "signed")
    with pytest.raises(SettingsError, match="set --tls-ca to who signed it"):
        serve(config=ServeConfig(tls_cert=signed.cert, tls_key=signed.key))
    config = ServeConfig(tls_ca=signed.ca, tls_cert=signed.cert, tls_key=signed.key)
    assert _tls_environment(config) == {
        "TWOSTROKE_TLS_CA": str(signed.ca),
        "TWOSTROKE_TLS_CERT": str(signed.cert),
        "TWOSTROKE_TLS_KEY": str(signed.key),
    }
