"""The shop's protos are compatible with those of the last release (docs/decisions/0011)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import REPOSITORY

pytestmark = pytest.mark.slow

RELEASED = REPOSITORY / "protos" / "released.binpb"
USER, ORDER = (Path("protos/weft") / name for name in ("user", "order"))


def breaking(checkout: Path) -> str:
    """What buf reports for the protos in ``checkout``: nothing if they are compatible."""
    buf = Path(sys.executable).with_name("buf")
    done = subprocess.run(
        [buf, "breaking", "--against", RELEASED], cwd=checkout, capture_output=True, text=True, timeout=60
    )
    assert done.returncode in {0, 100}, done.stderr
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the protos."""
    for name in ("protos", "third_party"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    shutil.copy(REPOSITORY / "buf.yaml", tmp_path)
    return tmp_path


def test_released_clients_keep_working() -> None:
    assert breaking(REPOSITORY) == ""


@pytest.mark.parametrize(
    ("contract", "before", "after"),
    [
        (USER / "v1/user.proto", "string name = 2", "string full_name = 2"),
        (USER / "v2/user.proto", "UserName name = 2;", "string name = 2;"),
        (USER / "v2/user.proto", "  string family = 2", "  string family = 3"),
        (ORDER / "v1/order.proto", "STATE_CONFIRMED = 2", "STATE_CONFIRMED = 9"),
    ],
    ids=["v1 field renamed", "v2 field retyped", "v2 field renumbered", "order state renumbered"],
)
def test_breaking_changes_are_detected(checkout: Path, contract: Path, before: str, after: str) -> None:
    changed = (checkout / contract).read_text()
    assert before in changed
    (checkout / contract).write_text(changed.replace(before, after, 1))
    assert str(contract) in breaking(checkout)


def test_order_stubs_name_the_missing_package() -> None:
    program = "import sys; sys.modules['google.type'] = None; import weft.user.v1.user_pb2; import weft.order"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stderr.endswith("needs googleapis-common-protos for google.type.Money: pip install 'weft[services]'\n")
