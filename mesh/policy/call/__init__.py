"""One call: its deadline, retries, hedges, and the limits that they share with other calls."""
