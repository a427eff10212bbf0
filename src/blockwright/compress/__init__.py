"""Smaller and faster after training."""
