"""Generated from protos/weft/notification."""
