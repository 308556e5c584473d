"""Generated from protos/weft/user/v1."""
