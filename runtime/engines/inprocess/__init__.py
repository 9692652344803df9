"""An engine in this process, stepped by a thread of ours."""
