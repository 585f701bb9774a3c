"""Keys and the tenants behind them, and the file that declares these."""

import pytest

from macaw.errors import UnauthorizedError
from macaw_server.errors import ConfigError
from macaw_server.service.tenants import Tenants, read_tenants
from macaw_server.service.types import NamedTenant

FILE = """
[research]
keys = ["old-key", "new-key"]
weight = 2

[web-shop]
keys = ["shop-key"]
"""


def bearer(key):
    return f"Bearer {key}"


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "tenants.toml"
        path.write_text(text)
        return path

    return write


def test_a_tenant_is_the_same_by_any_of_its_keys(file):
    tenants = Tenants(["plain"], read_tenants(file(FILE)))
    old, new = tenants.authenticate(bearer("old-key")), tenants.authenticate(bearer("new-key"))
    assert old == new
    assert (old.id, old.weight) == ("research", 2.0)
    others = [tenants.authenticate(bearer(key)) for key in ("shop-key", "plain")]
    assert [tenant.weight for tenant in others] == [1.0, 1.0]
    assert len({tenant.salt for tenant in (old, *others)}) == len({tenant.id for tenant in (old, *others)}) == 3
    assert len(tenants) == 3
    with pytest.raises(UnauthorizedError):
        tenants.authenticate(bearer("research"))


def test_a_key_cannot_be_chosen_so_that_its_salt_is_that_of_a_name():
    tenants = Tenants(["name:a", "a"], [NamedTenant("a", ("k",))], secret=b"s")
    salts = {tenants.authenticate(bearer(key)).salt for key in ("name:a", "a", "k")}
    assert len(salts) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[a\n", "cannot be read"),
        ("[a]\nweight = 2", "a.keys: Field required"),
        ("[a]\nkeys = []", "a.keys"),
        ('[a]\nkeys = ["secret"]\nweight = 0', "a.weight: Input should be greater than 0"),
        ('[a]\nkeys = ["secret"]\nwait = 1', "a.wait: Extra inputs are not permitted"),
        ('["a/b"]\nkeys = ["secret"]', "a/b"),
    ],
)
def test_a_wrong_file_is_said_without_its_keys(file, text, words):
    with pytest.raises(ConfigError, match=words) as error:
        read_tenants(file(text))
    assert "secret" not in str(error.value)


def test_a_key_of_two_tenants_is_refused():
    with pytest.raises(ConfigError, match="'a' and 'b' have the same API key"):
        Tenants([], [NamedTenant("a", ("k",)), NamedTenant("b", ("k",))])


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read"):
        read_tenants(tmp_path / "none.toml")
