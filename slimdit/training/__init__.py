"""Passes over data: what to learn from, and the loop that learns."""
