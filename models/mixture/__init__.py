"""Mixtures of experts: routing, dispatch, grouped products, combination and the prices that balance the load."""
