"""Generated from protos/weft/user."""
