"""How a run reacts to signals, hangs, spikes and broken hardware; one file for each kind."""
