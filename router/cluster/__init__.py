"""The workers, as the router knows them."""
