"""What there is: base models, variants, and the folder that keeps them."""
