"""The process: its sockets, its HTTP connections, its start and its end. Nothing here knows a task."""
