"""``grpc.aio.Channel`` over a cluster."""
