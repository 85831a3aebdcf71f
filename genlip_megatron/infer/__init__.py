"""Using a trained model: captions."""
