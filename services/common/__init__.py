"""What the shop's services share: processes, settings, databases, requests, errors and logs."""
