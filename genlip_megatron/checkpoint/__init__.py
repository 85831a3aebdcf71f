"""Saving and loading a run's state, on any layout."""
