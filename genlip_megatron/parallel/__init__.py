"""Process groups, and the part of the work of each rank."""
