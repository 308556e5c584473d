"""Generated from protos/weft/mesh/v1."""
