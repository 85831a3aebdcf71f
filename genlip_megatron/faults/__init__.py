"""What a run does about what goes wrong around it; one file a kind of trouble."""
