"""One statement on PostgreSQL or SQLite, in one round trip. Nothing here knows a task or a table."""
