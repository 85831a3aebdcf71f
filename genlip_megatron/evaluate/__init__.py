"""Measure what a trained model has learned."""
