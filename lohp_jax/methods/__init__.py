"""Ways to train a generator of weights, each a `Method`."""
