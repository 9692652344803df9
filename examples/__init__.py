"""The examples, as scripts and workflow files; `metier demo` finds them here, in a checkout and in a wheel alike."""
