"""Meshloom: pre-training of language models on changing clusters. The folders beside this file are its packages."""

__version__ = "0.1.0"
