"""The server's half of the mesh: a servicer and one call make a service that lives in it."""
