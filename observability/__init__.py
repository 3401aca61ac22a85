"""Log lines, metrics and traces, for operators. Nothing here knows what the service does."""
