"""Process groups, and each rank's part of the sequence."""
