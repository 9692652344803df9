"""The methods that make variants, one module or folder each, and what they share."""
