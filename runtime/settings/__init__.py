"""Every setting of the runtime, one file a subject."""
