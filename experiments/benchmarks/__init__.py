"""The parts of ``experiments.bench``: clocks, cases of each operation, peers, the gate, and the pages of results."""
