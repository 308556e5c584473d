"""What a server takes, and when."""
