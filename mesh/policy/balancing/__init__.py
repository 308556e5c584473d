"""Which endpoint takes an attempt."""
