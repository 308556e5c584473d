"""Generated from protos/weft/user/v2."""
