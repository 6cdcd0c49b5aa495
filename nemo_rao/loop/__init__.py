"""What happens around the steps of a run, whatever engine drives it."""
