"""Pure ASGI layers around the application, and the dependency that reads the caller. None imports another."""
