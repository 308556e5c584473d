"""``grpc.Channel`` over a cluster."""
