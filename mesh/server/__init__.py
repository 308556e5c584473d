"""The server side: serves servicers, registers them, and protects them from overload."""
