"""Which endpoints there are, and what is known of them."""
