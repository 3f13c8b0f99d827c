"""The trainer mixin and checkpoints."""
