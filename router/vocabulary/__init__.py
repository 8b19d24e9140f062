"""What tokens mean: their bytes, texts and words, and the marks that a model's answers have."""
