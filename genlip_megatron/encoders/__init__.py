"""Vision encoders of every kind behind one interface, for the evaluation tools and for multimodal LLMs."""
