"""Live events: who listens, what they are told, and how it is sent."""
