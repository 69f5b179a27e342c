"""Who may ask: the network process, and pjwd's commands around it."""
