"""The wheel in an empty environment outside the repository: typed stubs, and a mesh channel that makes a call."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# What pyproject.toml declares, and what that in turn needs.
NEEDED = ("grpcio", "protobuf", "grpcio-health-checking", "typing-extensions")

CLIENT = """
import asyncio
from concurrent import futures

import grpc

import mesh
import mesh.aio
from weft.user.v1 import user_pb2, user_pb2_grpc

class Users(user_pb2_grpc.UserServiceServicer):
    def GetUser(self, request, context):
        return user_pb2.GetUserResponse(user=user_pb2.User(id=request.id, name="Ada"))


server = grpc.server(futures.ThreadPoolExecutor(2))
user_pb2_grpc.add_UserServiceServicer_to_server(Users(), server)
port = server.add_insecure_port("127.0.0.1:0")
server.start()

with mesh.insecure_channel(f"static:///127.0.0.1:{port}") as channel:
    print(user_pb2_grpc.UserServiceStub(channel).GetUser(user_pb2.GetUserRequest(id="1"), timeout=10).user.name)


async def call():
    async with mesh.aio.insecure_channel(f"static:///127.0.0.1:{port}") as channel:
        stub = user_pb2_grpc.UserServiceStub(channel)
        print((await stub.GetUser(user_pb2.GetUserRequest(id="1"), timeout=10)).user.name)


asyncio.run(call())
server.stop(None).wait()
"""

TESTING = """
import mesh.testing
from weft.user.v1 import user_pb2, user_pb2_grpc

class Users(user_pb2_grpc.UserServiceServicer):
    def GetUser(self, request, context):
        return user_pb2.GetUserResponse(user=user_pb2.User(id=request.id, name="Ada"))


with mesh.testing.Mesh() as testing:
    testing.serve([(user_pb2_grpc.add_UserServiceServicer_to_server, Users())], replicas=2)
    stub = user_pb2_grpc.UserServiceStub(testing.channel("weft.user.v1.UserService"))
    print(stub.GetUser(user_pb2.GetUserRequest(id="1"), timeout=10).user.name)
"""


def _run(*arguments: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(argument) for argument in arguments], cwd=cwd, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, REPOSITORY, cwd=folder)
    [wheel] = folder.glob("weft-*.whl")
    return wheel


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel and its three dependencies, linked to from this one: no network."""
    folder = tmp_path_factory.mktemp("environment")
    _run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    _run(*pip, "install", "-q", "--no-index", "--no-deps", wheel, cwd=folder)
    packages = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    for name in NEEDED:
        for file in metadata.files(name) or ():
            if ".." in file.parts or "__pycache__" in file.parts:
                continue
            link = packages / file
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path(str(file.locate())))
    _run(*pip, "check", cwd=folder)
    return python


@pytest.mark.slow
def test_the_wheel_needs_three_packages_and_calls_through_a_mesh_channel(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text(CLIENT)
    assert _run(environment, "-I", "client.py", cwd=tmp_path).split() == ["Ada", "Ada"]


@pytest.mark.slow
def test_mesh_testing_needs_no_pytest(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "testing.py").write_text(TESTING)
    assert _run(environment, "-I", "-W", "error", "testing.py", cwd=tmp_path).split() == ["Ada"]


@pytest.mark.slow
def test_the_wheel_is_typed_and_holds_the_mesh_the_stubs_and_pytest_s_plugin_alone(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "mesh/py.typed",
        "mesh/testing/__init__.py",
        "weft/__init__.py",
        "weft/py.typed",
        "weft/user/v1/user_pb2.py",
        "weft/user/v1/user_pb2.pyi",
        "weft/user/v1/user_pb2_grpc.py",
        "weft/user/v1/user_pb2_grpc.pyi",
        "weft/mesh/v1/registry_pb2_grpc.py",
        "weft/order/v1/order_pb2.py",
    } <= names
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"mesh", "weft", "pytest_weft.py"}
    [points] = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
    assert zipfile.ZipFile(wheel).read(points).decode().split("\n")[:2] == ["[pytest11]", "weft = pytest_weft"]
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_one_distribution_owns_the_packages(environment: Path, tmp_path: Path) -> None:
    """With two, uninstalling one would break the other."""
    program = "from importlib.metadata import packages_distributions as of; print(*{*of()['weft'], *of()['mesh']})"
    assert _run(environment, "-I", "-c", program, cwd=tmp_path).split() == ["weft"]
