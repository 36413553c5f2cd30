"""Keys on the command line, and what a server makes of a store that has some."""

import json
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner, Result
from tests.server.test_serve import serving

from logitcache.labels.errors import InvalidName, InvalidRequest, NotFound, StorageFault, Unavailable
from logitcache.server.cli import cli
from logitcache.server.keys import PREFIX, Keys, KnownKeys


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def test_a_key_is_told_once_listed_without_it_and_revoked(tmp_path: Path) -> None:
    store = str(tmp_path)
    made = run("keys", "make", "trainer", "--scope", "write", "--store", store)
    key = made.stdout.strip()
    assert key.startswith(PREFIX)
    assert len(key) >= len(PREFIX) + 43  # 256 bits
    listed = run("keys", "ls", "--store", store).stdout
    assert [line.split()[:2] for line in listed.splitlines()] == [["NAME", "SCOPE"], ["trainer", "write"]]
    assert key not in listed
    assert run("keys", "revoke", "trainer", "--store", store).exit_code == 0
    assert len(run("keys", "ls", "--store", store).stdout.splitlines()) == 1


def test_two_keys_are_never_the_same(tmp_path: Path) -> None:
    keys = Keys(tmp_path)
    assert len({keys.make(f"key-{number}", "read") for number in range(20)}) == 20


def test_a_name_that_is_taken_unknown_or_none_is_refused(tmp_path: Path) -> None:
    keys = Keys(tmp_path)
    keys.make("trainer", "read")
    with pytest.raises(InvalidRequest, match="revoke it first"):
        keys.make("trainer", "admin")
    with pytest.raises(NotFound, match="did you mean 'trainer'"):
        keys.revoke("trainr")
    for name in ("../escape", "", ".hidden", "a/b", "a\nb"):
        with pytest.raises(InvalidName):
            keys.make(name, "read")
        with pytest.raises(InvalidName):
            keys.revoke(name)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[" * 5000, b'{"name": "x", "scope": "root", "sha256": "", "made": 0}', b"\xff", b"x" * 10_000],
)
def test_a_file_that_holds_no_key_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    Keys(tmp_path).make("good", "read")
    (tmp_path / ".keys" / "bad.json").write_bytes(content)
    with pytest.raises(StorageFault, match=r"bad\.json"):
        Keys(tmp_path).read()
    Keys(tmp_path).revoke("bad")
    assert [key.name for key in Keys(tmp_path).read()] == ["good"]


def test_keys_of_a_store_that_is_not_there_are_refused(tmp_path: Path) -> None:
    result = run("keys", "make", "trainer", "--store", str(tmp_path / "nothing"))
    assert result.exit_code == 1
    assert "nothing" in result.stderr


def test_keys_that_were_read_too_long_ago_let_nobody_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = KnownKeys(Keys(tmp_path))
    key = Keys(tmp_path).make("trainer", "read")
    with pytest.raises(Unavailable):
        known.find(key)
    known.read_again()
    assert known.find(key) is not None
    monkeypatch.setattr("logitcache.server.keys.TRUSTED_S", -1.0)
    with pytest.raises(Unavailable, match="in time"):
        known.find(key)


def test_whether_there_are_keys_is_not_known_without_the_store(tmp_path: Path) -> None:
    assert Keys(tmp_path).read() == []
    with pytest.raises(Unavailable, match="no store"):
        Keys(tmp_path / "away").read()


def test_a_server_wants_keys_where_the_store_has_any(finished_store: Path, own_store: Path) -> None:
    key = Keys(own_store).make("trainer", "read")
    with serving("--store", str(own_store), "--host", "0.0.0.0", "--port", "0") as (_, told):
        url = told["url"]
        assert told["keys"] is True
        assert httpx.get(f"{url}/v1/label-sets").status_code == 401
        listed = httpx.get(f"{url}/v1/label-sets", headers={"Authorization": f"Bearer {key}"})
        assert {each["name"] for each in json.loads(listed.text)} == {"digits", "half"}


def test_a_server_that_was_told_none_wants_none(own_store: Path) -> None:
    Keys(own_store).make("trainer", "read")
    with serving("--store", str(own_store), "--port", "0", "--auth", "none") as (_, told):
        assert httpx.get(f"{told['url']}/v1/label-sets").status_code == 200


def test_a_server_that_was_told_keys_lets_nobody_in_without(finished_store: Path) -> None:
    with serving("--store", str(finished_store), "--port", "0", "--auth", "keys") as (_, told):
        assert httpx.get(f"{told['url']}/v1/label-sets").status_code == 401
        assert httpx.get(f"{told['url']}/healthz").status_code == 200
