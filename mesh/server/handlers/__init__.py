"""What stands around a server's handlers."""
