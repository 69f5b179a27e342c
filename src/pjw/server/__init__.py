"""The network process, which admits callers, and pjwd's commands around it."""
