"""What depends on how a run is spread over ranks."""
