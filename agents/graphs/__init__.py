"""Task graphs: declared, built and checked; their files, pictures and step paths."""
