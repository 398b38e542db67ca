"""Routing that needs PyTorch: recordings in its format, capture from a running model, a small model of our own."""
