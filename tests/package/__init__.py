"""What `make package` made."""
