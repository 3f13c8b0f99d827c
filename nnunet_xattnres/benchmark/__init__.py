"""The benchmark: a matrix of real nnU-Net trainings, and what it shows."""
