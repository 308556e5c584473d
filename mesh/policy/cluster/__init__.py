"""Which endpoints a client uses, and their state: breakers, outlier detection, weights, load."""
