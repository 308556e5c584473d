"""Creates users and orders concurrently through the mesh, with asyncio. Run `make run-mesh` first."""

import asyncio
import os
import uuid

import mesh.aio
from weft.order.v1 import order_pb2, order_pb2_grpc
from weft.user.v1 import user_pb2, user_pb2_grpc

os.environ.setdefault("MESH_REGISTRY", "127.0.0.1:50050")  # as in `make run-mesh`


async def main() -> None:
    async with (
        mesh.aio.insecure_channel("mesh:///weft.user.v1.UserService") as user_channel,
        mesh.aio.insecure_channel("mesh:///weft.order.v1.OrderService") as order_channel,
    ):
        users = user_pb2_grpc.UserServiceStub(user_channel)
        orders = order_pb2_grpc.OrderServiceStub(order_channel)

        async def buy(name: str) -> str:
            email = f"{name.lower()}-{uuid.uuid4().hex[:8]}@example.com"
            created = await users.CreateUser(user_pb2.CreateUserRequest(name=name, email=email), timeout=5)
            request = order_pb2.CreateOrderRequest(
                request_id=str(uuid.uuid4()),
                user_id=created.user.id,
                items=[order_pb2.OrderItem(sku="PUNCH-CARD", quantity=len(name))],
            )
            order = (await orders.CreateOrder(request, timeout=5)).order
            return f"order {order.id}: {order.items[0].quantity} × {order.items[0].sku} for {name}"

        for line in await asyncio.gather(*(buy(name) for name in ("Ada", "Grace", "Barbara", "Radia"))):
            print(line)


if __name__ == "__main__":
    asyncio.run(main())
