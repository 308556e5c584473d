"""Creates a user and an order through the mesh, with blocking calls. Run `make run-mesh` first."""

import os
import uuid

import mesh
from weft.order.v1 import order_pb2, order_pb2_grpc
from weft.user.v1 import user_pb2, user_pb2_grpc

os.environ.setdefault("MESH_REGISTRY", "127.0.0.1:50050")  # as in `make run-mesh`


def main() -> None:
    with (
        mesh.insecure_channel("mesh:///weft.user.v1.UserService") as user_channel,
        mesh.insecure_channel("mesh:///weft.order.v1.OrderService") as order_channel,
    ):
        users = user_pb2_grpc.UserServiceStub(user_channel)
        orders = order_pb2_grpc.OrderServiceStub(order_channel)

        email = f"ada-{uuid.uuid4().hex[:8]}@example.com"
        user = users.CreateUser(user_pb2.CreateUserRequest(name="Ada Lovelace", email=email), timeout=5).user
        print(f"user {user.id}: {user.name} <{user.email}>")

        items = [order_pb2.OrderItem(sku="PUNCH-CARD", quantity=100), order_pb2.OrderItem(sku="GEAR-7", quantity=2)]
        request = order_pb2.CreateOrderRequest(request_id=str(uuid.uuid4()), user_id=user.id, items=items)
        order = orders.CreateOrder(request, timeout=5).order
        again = orders.CreateOrder(request, timeout=5).order  # same request_id: same order
        print(f"order {order.id}: {', '.join(f'{item.quantity} × {item.sku}' for item in order.items)}")
        assert again.id == order.id

        listed = orders.ListOrders(order_pb2.ListOrdersRequest(user_id=user.id), timeout=5).orders
        print(f"{user.name} has {len(listed)} order")


if __name__ == "__main__":
    main()
