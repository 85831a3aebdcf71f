"""Weights under other names and layouts."""
