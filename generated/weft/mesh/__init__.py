"""Generated from protos/weft/mesh."""
