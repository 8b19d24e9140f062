"""How tokens are drawn, and what is said of them."""
