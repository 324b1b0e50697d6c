"""Where do training and evaluation rows come from: text, packed shards, synthetic tasks, and the order they are read in."""
