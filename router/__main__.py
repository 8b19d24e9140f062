"""`python -m router`: the same flags as `twostroke router`."""

from cli.main import main

if __name__ == "__main__":
    main("router")
