"""Generated from protos/weft/order/v1."""
