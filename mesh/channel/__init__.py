"""gRPC channels over a cluster: the drivers of the flow, the endpoints' own channels, and the call objects
(sync and asyncio)."""
