"""Feed-forward networks: what a block does to each token by itself."""
