"""Who is there: resolvers turn a target into endpoint sets."""
