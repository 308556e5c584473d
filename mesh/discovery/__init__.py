"""Name resolution: resolvers turn a target into endpoint sets."""
