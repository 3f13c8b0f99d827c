"""Attention weights recorded during a training, and drawn."""
