"""Everything but the algorithm, which is in train.py. Import this package before torch."""

from src import threads

threads.configure()
