"""The user service: users, who may place orders."""
