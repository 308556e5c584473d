"""What wraps a server's handlers."""
