"""Mixtures of experts over ranks: what of the balance needs more than one rank's tokens."""
