"""What is said: messages to model and back, errors to gRPC status and back."""
