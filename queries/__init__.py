"""Every statement about tasks and accounts, started from their owner. Nothing here knows HTTP or a driver."""
