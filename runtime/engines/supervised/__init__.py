"""An engine in processes of its own, restarted when it dies."""
