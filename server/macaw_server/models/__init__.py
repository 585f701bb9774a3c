"""Models and tokenizers: finding, loading and checking them."""
