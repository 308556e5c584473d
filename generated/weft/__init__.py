"""Generated from protos/weft."""
