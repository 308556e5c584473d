"""The stubs in a process with other packages, and beside folders of their name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow

# Another release of buf/validate/validate.proto, as a package that bundles its stub registers it.
OTHERS = """
def theirs():
    from google.protobuf import descriptor_pb2, duration_pb2, timestamp_pb2
    with open(sys.argv[1], "rb") as file:
        descriptor_pool.Default().AddSerializedFile(file.read())

def ours():
    from weft.user.v1 import user_pb2
    return user_pb2

first, second = {order}
request = (first() or second() or ours()).CreateUserRequest(name="", email="ada@example.com")
second()

import protovalidate
assert [violation.proto.rule_id for violation in protovalidate.collect_violations(request)] == ["string.min_len"]

options = type(request).DESCRIPTOR.fields_by_name["name"].GetOptions()
rules = descriptor_pool.Default().FindExtensionByName("buf.validate.field")
assert type(options).FromString(options.SerializeToString()).HasExtension(rules)
"""


@pytest.fixture(scope="module")
def another_validate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    buf = Path(sys.executable).with_name("buf")
    built = subprocess.run([buf, "build", "third_party", "-o", "-"], cwd=REPOSITORY, capture_output=True, check=True)
    files = descriptor_pb2.FileDescriptorSet.FromString(built.stdout).file
    validate = next(file for file in files if file.name == "buf/validate/validate.proto")
    validate.ClearField("source_code_info")
    validate.message_type.add(name="OfAnotherRelease")
    path = tmp_path_factory.mktemp("validate") / "validate"
    path.write_bytes(validate.SerializeToString())
    return path


@pytest.mark.parametrize("implementation", ["upb", "python"])
@pytest.mark.parametrize("order", ["ours, theirs", "theirs, ours"])
def test_another_release_of_buf_validate_may_be_in_the_process(
    order: str, implementation: str, another_validate: Path
) -> None:
    program = "import sys\nfrom google.protobuf import descriptor_pool\n"
    program += OTHERS.replace("{order}", order)
    environment = {**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": implementation}
    command = [sys.executable, "-W", "error", "-c", program, str(another_validate)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_clone_named_weft_beside_a_script_does_not_hide_the_stubs(tmp_path: Path) -> None:
    (tmp_path / "weft").symlink_to(REPOSITORY)
    program = (
        "import mesh, mesh.registry.service\nfrom weft.mesh.v1 import registry_pb2\nfrom weft.user.v1 import user_pb2"
    )
    (tmp_path / "script.py").write_text(program)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
