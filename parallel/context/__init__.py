"""Context parallelism: samples cut over ranks, ring and Ulysses attention."""
