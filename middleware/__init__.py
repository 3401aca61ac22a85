"""The front, which every request passes, its parts, and the dependency that reads the caller."""
