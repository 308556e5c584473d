"""What happens to one call."""
