"""The command `inspect`: the attention weights of a trained model in any case."""
