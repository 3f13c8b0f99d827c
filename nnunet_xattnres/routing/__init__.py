"""What a network reads: attention weights collected, recorded during training, drawn, and written for any case."""
