"""What the shop's services have in common: how each is run, stores, answers and logs."""
