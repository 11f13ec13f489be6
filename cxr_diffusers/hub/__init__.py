"""Finished models and data sets: loading, model cards, publishing."""
