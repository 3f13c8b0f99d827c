"""Errors, files, devices, processes and figures: what every other package may use."""
