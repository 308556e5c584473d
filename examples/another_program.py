"""A program outside this repository. It only needs the installed wheel, which has the stubs and the mesh.

    pip install weft-*.whl
    MESH_REGISTRY=127.0.0.1:50050 python another_program.py

It lists the users page by page, and prints for each call which replicas were tried.
"""

import os
import sys

import grpc

import mesh
from weft.user.v1 import user_pb2, user_pb2_grpc


def main() -> int:
    registry = os.environ.get("MESH_REGISTRY", "127.0.0.1:50050")
    with mesh.insecure_channel(f"mesh://{registry}/weft.user.v1.UserService") as channel:
        stub = user_pb2_grpc.UserServiceStub(channel)
        request = user_pb2.ListUsersRequest(page_size=100)
        count = 0
        try:
            while True:
                page, call = stub.ListUsers.with_call(request, timeout=5)
                count += len(page.users)
                print(mesh.explain(call))  # which endpoints were tried, and how each attempt ended
                if not page.next_page_token:
                    break
                request.page_token = page.next_page_token
        except grpc.RpcError as error:
            print(error, file=sys.stderr)
            return 1
    print(f"users: {count}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
