"""Runs statements on PostgreSQL or SQLite, one round trip each. Nothing here knows a task or a table."""
