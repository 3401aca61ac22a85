"""Live events: the open streams, what wakes them, and the response."""
