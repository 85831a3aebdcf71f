"""Files that are copied into exported folders. They import nothing of this package."""
