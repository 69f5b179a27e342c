"""The translation of values: messages to model and back, errors to gRPC status and back."""
