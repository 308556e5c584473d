"""The order service's stubs. Orders contain google.type.Money, whose stub is in googleapis-common-protos."""

try:
    import google.type.money_pb2  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "weft.order needs googleapis-common-protos for google.type.Money: pip install 'weft[services]'", name=error.name
    ) from None
