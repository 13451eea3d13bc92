"""Pairs: source, target and instruction, from many places in one form."""
