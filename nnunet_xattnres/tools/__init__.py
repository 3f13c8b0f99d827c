"""What a user types: demo, doctor, inspect and warm-start."""
