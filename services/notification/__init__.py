"""The notification service: tells users about their orders."""
