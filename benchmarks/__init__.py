"""What pjw costs, measured; each file says how to run it."""
