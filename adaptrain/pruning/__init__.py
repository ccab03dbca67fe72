"""Structured pruning: which parts of a model can go, what they are worth, what they cost, and taking them out."""
