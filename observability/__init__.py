"""What operators read: log lines, metrics, traces. Nothing here knows what the service does."""
