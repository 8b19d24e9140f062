"""How the parts of a cluster listen, and reach each other."""
