"""Measuring what a trained model has learned."""
