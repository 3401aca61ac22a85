"""Every statement about tasks and accounts, filtered by their owner. Nothing here knows HTTP or a driver."""
