"""Tests for code that calls or serves over the mesh: a mesh in the test's process, fault injection, a fake clock.

    import mesh.testing

    def test_the_client_retries():
        with mesh.testing.Mesh() as mesh_:
            mesh_.serve([(add_UserServiceServicer_to_server, Users())], replicas=3)
            mesh_.faults.fail(grpc.StatusCode.UNAVAILABLE, times=1)
            assert name_of("1") == "Ada"  # code under test, with a channel to mesh:///weft.user.v1.UserService
            first, second = mesh_.calls.wait(2)
            assert first.code is grpc.StatusCode.UNAVAILABLE

Nothing is mocked: servers, registry and channels are the ones used in production, on free ports of 127.0.0.1. In
pytest, the fixtures ``weft_mesh`` and ``weft_mesh_aio`` provide such a mesh, without any import.

A mesh
    Mesh                               a registry, replicas and channels
    Replica                            one of its servers, which can be drained, stopped and started
    aio                                the same for asyncio: ``mesh.testing.aio.Mesh``

Faults
    Mesh.faults                        ``Faults``: make replicas fail, delay or drop calls
    Fault                              one of them: counts the calls it affected, and can be removed

Recorded calls
    Mesh.calls                         ``Calls``: a sequence of ``RecordedCall``, which can be waited for

Time
    FakeClock                          for code that takes a clock

docs/testing.md has examples of all of it.
"""

from mesh.testing import aio
from mesh.testing.calls import Calls
from mesh.testing.clock import FakeClock
from mesh.testing.faults import Fault, Faults
from mesh.testing.recording import RecordedCall
from mesh.testing.sync import Mesh, Replica

__all__ = ["Calls", "FakeClock", "Fault", "Faults", "Mesh", "RecordedCall", "Replica", "aio"]
