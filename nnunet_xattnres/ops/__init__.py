"""The attention as a function of tensors: resampling and projection, the backends, and the choice among them."""
