"""The trainer mixin, checkpoints, and records of attention weights."""
