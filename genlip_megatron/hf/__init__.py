"""The Hugging Face side: files that are copied into exported folders, and so import nothing of this package."""
