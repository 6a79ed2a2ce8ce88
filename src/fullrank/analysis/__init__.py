"""Measurements of a model and its gradients: what a method assumes, looked at on your own model and data."""
