"""The user service: who may order."""
