"""How much each client may do in its next task."""
